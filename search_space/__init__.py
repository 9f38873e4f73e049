"""The vocabulary of layers and the grammar of layouts, with exact prices; knows no storage and no trial."""
