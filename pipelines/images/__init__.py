"""Image rows and their keys, images in any storage, and the choice of rows for a job."""
