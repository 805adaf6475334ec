from torch.nn.functional import silu

ACTIVATIONS = {"silu": silu}
