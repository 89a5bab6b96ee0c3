"""The first bad op of a training step, forward or backward, with its cause."""

from sdkit.diagnosis.cause import find_cause
from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.diagnosis.place import place_of, stage_of
from sdkit.diagnosis.trace import find_first_bad_op
from sdkit.emulate import active as find_emulation


def diagnose_training_step(measure_loss, modules) -> Diagnosis:
    """Measures a loss, goes backward, and names the first op that made NaN or Inf.

    The gradients that the parameters had stay as they were; no optimiser is stepped. An op of the
    backward is put down to the module whose forward it undoes.

    Args:
        measure_loss: Function without arguments that returns a scalar loss.
        modules: {name: module} of what is trained, such as {"unet": pipe.unet}.

    Returns:
        A Diagnosis: `module` and `op` are of the forward, or of the backward, which the evidence
        tells (`"pass"`). Its cause is "healthy" if loss and gradients are finite.
    """
    parameters = [p for module in modules.values() for p in module.parameters()]
    kept = [parameter.grad for parameter in parameters]

    def step():
        loss = measure_loss()
        loss.backward()
        return [loss, *(p.grad for p in parameters if p.grad is not None)]

    try:
        for parameter in parameters:
            parameter.grad = None
        # Each by itself: an Inf of the forward may be found out only when the backward is over.
        name, bad = "forward", find_first_bad_op(measure_loss, modules)
        if bad is None:
            name, bad = "backward", find_first_bad_op(step, modules)
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
    if bad is None:
        return Diagnosis("none", None, None, None, "healthy", emulated=find_emulation())
    cause = find_cause(bad)
    module = cause.module or bad.module
    return Diagnosis(
        stage=stage_of(module or place_of(bad)),
        step=None,
        module=module or None,
        op=bad.op,
        cause=cause.name,
        evidence={"pass": name, **cause.evidence},
        remedy=cause.remedy,
        bad_op=bad,
        emulated=find_emulation(),
    )
