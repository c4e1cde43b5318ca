"""What commands of many runs share: rows split once, work in processes of its own, records that are kept."""
