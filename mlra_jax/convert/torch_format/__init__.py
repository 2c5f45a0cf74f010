"""Archives as `torch.save` writes them: read without running a pickle, written without PyTorch."""
