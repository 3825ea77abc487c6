"""What comes before measuring and takes a while, told as it goes: kernels that are compiled once, a model to read."""

from exeunt.calibration.kernel_compilation import compile_kernels
from exeunt.calibration.progress import ProgressReport
from exeunt.compression.model import LoadedModel
from exeunt.deploy.loading import find_source, load_model, resolve_device
from exeunt.server.settings import given_settings


def load_to_measure(name: str, device: str, progress: ProgressReport) -> LoadedModel:
    """The bundle or plain model `name`, loaded for measuring: a server's environment variables have no part in it.

    Raises what `find_source` and `load_model` raise.
    """
    place = resolve_device(device)
    source = find_source(name)
    compile_kernels(place, progress)
    with progress.phase("Loading the model", 1) as advance:
        model = load_model(source, given_settings({"device": device}))
        advance(1)
    return model
