"""What mshab's wrappers need of gymnasium 0.29: import this before them."""

import gymnasium


def forward_attributes(self, name):
    if name.startswith("_"):
        raise AttributeError(name)
    return getattr(self.env, name)


# It had this name, and its wrappers forwarded attributes.
gymnasium.vector.VectorEnvWrapper = gymnasium.vector.VectorWrapper
gymnasium.Wrapper.__getattr__ = forward_attributes
