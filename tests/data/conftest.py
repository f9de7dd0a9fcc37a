"""Property tests of this room have no deadline: a busy machine is no failure."""

import hypothesis

hypothesis.settings.register_profile("data", deadline=None)
hypothesis.settings.load_profile("data")
