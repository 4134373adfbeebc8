"""How Emojiland is made and measured: the recipe of its networks. Not part of the package."""
