"""Attention modules with one mistake each, all of them seen in published code. The laws must catch every one."""
