"""What can be wrong with a pipeline; the messages say what to do."""


class UnsupportedPipelineError(ValueError):
    """The pipeline cannot be a policy as it is; the message says why and what to do."""


class ReplayError(RuntimeError):
    """A replay does not walk the path of its rollout; the message says where it left it."""
