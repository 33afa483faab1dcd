"""The scene: a clothed person who walks, rendered once to buffers into which textures enter differentiably."""
