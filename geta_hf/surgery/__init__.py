"""Cut a model: slice its tensors, solve for the sizes its code reads, and prove that it still computes the same.

No architecture is known by name. What a model's code does with sizes is recorded, written as equations and solved.
"""
