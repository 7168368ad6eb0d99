"""Write a compressed model into a folder and read it back: packed weights, the loader, and the code a folder carries.

Importing this room registers geta_hf's quantizer with transformers, so that `from_pretrained` reads such folders.
"""
