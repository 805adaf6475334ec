from a_framework_not_here import PretrainedConfig


class SmallConfig(PretrainedConfig):
    pass


class OwnConfig:
    """Has defaults, and accepts what it does not know, as config classes of libraries do."""

    def __init__(self, hidden_size=32, num_heads=4, num_key_value_heads=2, **kwargs):
        self.hidden_size, self.num_heads, self.num_key_value_heads = hidden_size, num_heads, num_key_value_heads
        for name, value in kwargs.items():
            setattr(self, name, value)
