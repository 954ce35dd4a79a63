"""Image data sets behind one interface: pixels, labels, number of classes, train and test parts."""

from srn_lab.data.sets import NAMES, DataSpec, Images, MissingDataError, load

__all__ = ["NAMES", "DataSpec", "Images", "MissingDataError", "load"]
