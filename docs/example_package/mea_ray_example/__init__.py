"""Components for mea_ray in a package of their own."""
