"""What every part needs: errors, types, tables of components, seeds, versions."""
