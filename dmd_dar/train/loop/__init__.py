"""Steps: phases, optimiser, averages, the job around them."""

from dmd_dar import moved

moved.keep_names(__name__, f"{__name__}.loop")  # that this package was before
