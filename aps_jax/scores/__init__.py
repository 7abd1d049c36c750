"""Random, human and published scores, and how scores are taken."""
