"""The scoring rules by kind; `clmoe/evaluate/scoring.py` names them."""
