"""Which weights to remove: scores, masks, updates of those that stay, and the data that these are judged on."""
