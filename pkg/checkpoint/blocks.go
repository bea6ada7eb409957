package checkpoint

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// Blocks are checksums within a large file, so that a part of it can be checked
// without the rest: when a pager reads it, long after the restore has begun.
type Blocks struct {
	// SizeBytes is the size of each block but the last, a power of two.
	SizeBytes int64 `json:"sizeBytes"`
	// CRC32C has four bytes for each block, most significant first: the checksum
	// of the file from its beginning to the block's end. So the last is that of
	// the file.
	CRC32C []byte `json:"crc32c"`
}

const (
	minBlockBytes = 64 << 10
	maxBlockBytes = 16 << 20
	// minBlocksFile is the size from which on a file has blocks; a smaller one is
	// read at once.
	minBlocksFile = 1 << 20
	// maxBlocks bounds what a file adds to the manifest, a MiB as base64 text.
	maxBlocks = 192 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// BlockBytes is the size of the blocks for which checksums are to be kept of a
// file of a checkpoint; 0 for none.
func BlockBytes(path string, sizeBytes int64) int64 {
	if !isPages(path) || sizeBytes < minBlocksFile {
		return 0
	}
	for size := int64(minBlockBytes); size <= maxBlockBytes; size *= 2 {
		if (sizeBytes+size-1)/size <= maxBlocks {
			return size
		}
	}
	return 0
}

// Count is the number of blocks.
func (b *Blocks) Count() int64 { return int64(len(b.CRC32C) / 4) }

// sum is the checksum of the file up to the end of a block.
func (b *Blocks) sum(i int64) uint32 {
	if i < 0 {
		return 0
	}
	return binary.BigEndian.Uint32(b.CRC32C[4*i:])
}

// Add appends the checksum of the file up to the end of the next block.
func (b *Blocks) Add(crc uint32) { b.CRC32C = binary.BigEndian.AppendUint32(b.CRC32C, crc) }

// Check compares whole blocks of the file, from the one with the given number
// on; only the file's last one may be shorter. It returns an [ErrCorrupt].
func (b *Blocks) Check(first int64, data []byte) error {
	for i := first; len(data) > 0; i++ {
		block := data[:min(int64(len(data)), b.SizeBytes)]
		data = data[len(block):]
		if i < 0 || i >= b.Count() {
			return fmt.Errorf("block %d of %d: %w", i, b.Count(), ErrCorrupt)
		}
		if crc, want := crc32.Update(b.sum(i-1), castagnoli, block), b.sum(i); crc != want {
			return fmt.Errorf("bytes %d to %d have checksum %08x, want %08x: %w", i*b.SizeBytes, i*b.SizeBytes+int64(len(block)), crc, want, ErrCorrupt)
		}
	}
	return nil
}

// validate checks that the blocks are those of the file.
func (b *Blocks) validate(f File) error {
	switch {
	case b.SizeBytes < minBlockBytes || b.SizeBytes > maxBlockBytes || b.SizeBytes&(b.SizeBytes-1) != 0:
		return fmt.Errorf("blocks of %d bytes", b.SizeBytes)
	case len(b.CRC32C)%4 != 0 || b.Count() != (f.SizeBytes+b.SizeBytes-1)/b.SizeBytes:
		return fmt.Errorf("%d bytes of checksums for blocks of %d bytes", len(b.CRC32C), b.SizeBytes)
	case fmt.Sprintf("%08x", b.sum(b.Count()-1)) != f.CRC32C:
		return fmt.Errorf("the last block has checksum %08x, the file %s", b.sum(b.Count()-1), f.CRC32C)
	}
	return nil
}
