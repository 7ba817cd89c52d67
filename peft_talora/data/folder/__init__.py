"""A folder of image and label files as a dataset."""
