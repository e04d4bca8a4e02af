"""Labels from the clinic: RTSTRUCT and DICOM-SEG -> label maps on the grid of imported images."""
