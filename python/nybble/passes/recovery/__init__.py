"""What recover is made of: trainable stand-ins for layers, their training, and the stages that it goes through."""
