from a_framework_not_here.models import *  # noqa: F403
