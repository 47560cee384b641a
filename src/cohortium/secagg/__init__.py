"""The secure sum: whoever adds up the sites' vectors learns the total and no single one."""
