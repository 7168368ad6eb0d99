"""Folders, checkpoints and files that earlier commits wrote, and proofs that they load as before."""
