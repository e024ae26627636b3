"""Model families, one file each, named after its `model_type`; models.family.all_families finds them."""
