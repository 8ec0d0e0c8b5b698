"""The ops: a file an op, with its schema, checks, pure-PyTorch path, fake kernel and autograd."""
