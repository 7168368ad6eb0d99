"""Ways to compress a model while it is trained: each one is a `Method`, and only this room knows how it decides.

A method reads limits, a pruning space and gradients, and ends with a `CompressionResult`: plain data that surgery and
export read. It knows nothing of Trainer.
"""
