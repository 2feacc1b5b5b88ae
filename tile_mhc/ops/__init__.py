"""The ops: check -> allocate -> launch, one file per op, each a torch.library operator."""
