"""OpenAI-compatible endpoints, so that an agent framework can act for a policy in training.

Start with `router.py`: every endpoint. `policies.py` is what the rest of the gateway provides.
"""

from .policies import Policies, ServedModel, ServedPolicy
from .router import openai_router
from .store import TrajectoryStore
