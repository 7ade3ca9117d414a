"""The parts of `nybble.recover`.

Inside: `sites` (the layers to train and their dense counterparts), `shadow` (a trainable stand-in for a layer), `correct`
(the closed-form correction), `losses`, `train` (the training loop), `work` (block by block, then end to end), `store`
(resuming), `report`.
"""
