"""What the train stage (``pipeline/train.py``) is made of."""
