"""What each operation computes, against eager PyTorch: a table of cases a family."""
