"""The ops: check -> allocate -> launch, one op a file, each a torch.library operator."""
