"""Count what a model costs, and find what a target allows: how many groups to remove and how many bits to spend.

Parameters, MACs, BOPs and bytes are counted here, and targets in any of them are solved for before training. Nothing
here knows which method asks.
"""
