"""What the tests of fused rope compare models by."""


def state_of(model):
    """Everything that a module holds but its parameters: class, attributes, buffers and how they are saved."""
    return [
        (name, type(module), sorted(vars(module)), sorted(module._buffers), sorted(module._non_persistent_buffers_set))
        for name, module in model.named_modules()
    ]
