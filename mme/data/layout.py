"""File names and format version of a training set; `mme.data.parts` describes the content."""

from __future__ import annotations

FORMAT_VERSION = 2
INFO_FILE = "dataset.json"
ITEMS_FILE = "items.parquet"
LEFT_OUT_FILE = "left_out.parquet"
FEATURES_FILE = "features.parquet"
PART_FILES = "part-*.parquet"
CACHE_FOLDER = ".cache"  # made when the set is first read
OWN_FILES = (INFO_FILE, ITEMS_FILE, LEFT_OUT_FILE, FEATURES_FILE, PART_FILES, CACHE_FOLDER)
FRACTIONS = "fractions_ns"  # column for times finer than a second: nanoseconds beyond `timestamps`
TITLE = "title"  # column of items.parquet, text or null
ATTRIBUTE_PREFIX = "attribute_"  # prefix of the columns that `--item-attributes` adds to items.parquet, text or null
FEATURE_PREFIX = "feature_"  # prefix of the columns that `--feature-columns` adds to the parts
