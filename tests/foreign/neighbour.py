def keep_heads(qkv, n_heads):
    return [t.unflatten(-1, (n_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1)]
