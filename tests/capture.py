"""What takes the place of CUDA graphs where there is no device to capture them on."""

from dataclasses import fields, is_dataclass, replace


def call_directly(run):
    """Captures nothing: runs the pass anew each time."""
    return run


def like_a_graph(run):
    """What a captured graph does: it ran once before, and each replay writes its outputs where the last one did."""
    outputs = tensors_of(run())

    def replay():
        new = run()
        for kept, tensor in zip(outputs, tensors_of(new), strict=True):
            kept.copy_(tensor)
        if not is_dataclass(new):
            return outputs[0]
        names = [field.name for field in fields(new) if getattr(new, field.name) is not None]
        return replace(new, **dict(zip(names, outputs, strict=True)))

    return replay


def tensors_of(outputs):
    """The tensors of what a pass gives, in the order of its fields."""
    values = [getattr(outputs, field.name) for field in fields(outputs)] if is_dataclass(outputs) else [outputs]
    return [value for value in values if value is not None]
