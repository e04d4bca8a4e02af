"""Label maps as DICOM objects that refer to the series they belong to: DICOM-SEG and RTSTRUCT."""
