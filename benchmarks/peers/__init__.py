"""tilewright beside the systems that a user would pick instead: ``python -m benchmarks.peers --help``.

Modules here import the standard library alone at their top: a part of each runs inside the environment of a peer.
"""
