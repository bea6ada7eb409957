package checkpoint_test

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"testing"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

const (
	kib = 1 << 10
	gib = 1 << 30
)

// blocksOf sums data as the store does.
func blocksOf(data []byte, size int64) (*checkpoint.Blocks, string) {
	b := &checkpoint.Blocks{SizeBytes: size}
	crc := uint32(0)
	for rest := data; len(rest) > 0; {
		n := min(int64(len(rest)), size)
		crc = crc32.Update(crc, crc32.MakeTable(crc32.Castagnoli), rest[:n])
		b.Add(crc)
		rest = rest[n:]
	}
	return b, fmt.Sprintf("%08x", crc)
}

func TestBlocksCheck(t *testing.T) {
	const size = 64 * kib
	data := make([]byte, 3*size+100)
	rand.NewChaCha8([32]byte{1}).Read(data)
	b, _ := blocksOf(data, size)
	if b.Count() != 4 {
		t.Fatalf("%d blocks", b.Count())
	}
	for first := range b.Count() {
		for last := first; last < b.Count(); last++ {
			part := data[first*size : min((last+1)*size, int64(len(data)))]
			if err := b.Check(first, part); err != nil {
				t.Errorf("blocks %d to %d: %v", first, last, err)
			}
			for _, at := range []int{0, len(part) / 2, len(part) - 1} {
				damaged := bytes.Clone(part)
				damaged[at] ^= 4
				if err := b.Check(first, damaged); !errors.Is(err, checkpoint.ErrCorrupt) {
					t.Errorf("blocks %d to %d, damaged at %d: %v", first, last, at, err)
				}
			}
		}
	}
	// A block in another one's place, less of one, and more than there is.
	for first, part := range map[int64][]byte{0: data[size : 2*size], 1: data[size : 2*size-1], 3: data, 4: data[:1], -1: data[:size]} {
		if err := b.Check(first, part); !errors.Is(err, checkpoint.ErrCorrupt) {
			t.Errorf("block %d: %v", first, err)
		}
	}
}

func TestBlockBytes(t *testing.T) {
	for _, tt := range []struct {
		path       string
		size, want int64
	}{
		{"checkpoint/pages-1.img", gib/kib - 1, 0},
		{"checkpoint/pages-1.img", gib / kib, 64 << 10},
		{"checkpoint/pages-12.img", 12 * gib, 64 << 10},
		{"checkpoint/pages-12.img", 12*gib + 1, 128 << 10},
		{"checkpoint/pages-12.img", 3 << 40, 16 << 20},
		{"checkpoint/pages-12.img", 3<<40 + 1, 0},
		{"checkpoint/core-1.img", gib, 0},
		{"rootfs-diff.layer", gib, 0},
		{"pages-1.img", gib, 0},
	} {
		if got := checkpoint.BlockBytes(tt.path, tt.size); got != tt.want {
			t.Errorf("%s of %d bytes: blocks of %d, want %d", tt.path, tt.size, got, tt.want)
		}
	}
}

func TestBlocksValidate(t *testing.T) {
	data := make([]byte, 3*64*kib+1)
	for name, change := range map[string]func(*checkpoint.File){
		"":               func(*checkpoint.File) {},
		"small blocks":   func(f *checkpoint.File) { f.Blocks.SizeBytes = 1 },
		"no size":        func(f *checkpoint.File) { f.Blocks.SizeBytes = 0 },
		"negative":       func(f *checkpoint.File) { f.Blocks.SizeBytes = -64 * kib },
		"no power":       func(f *checkpoint.File) { f.Blocks.SizeBytes = 3 * 64 * kib },
		"huge blocks":    func(f *checkpoint.File) { f.Blocks.SizeBytes = 32 << 20 },
		"one less":       func(f *checkpoint.File) { f.Blocks.CRC32C = f.Blocks.CRC32C[:12] },
		"torn":           func(f *checkpoint.File) { f.Blocks.CRC32C = f.Blocks.CRC32C[:15] },
		"one more":       func(f *checkpoint.File) { f.Blocks.Add(0) },
		"none":           func(f *checkpoint.File) { f.Blocks.CRC32C = nil },
		"longer file":    func(f *checkpoint.File) { f.SizeBytes += 64 * kib },
		"empty file":     func(f *checkpoint.File) { f.SizeBytes = 0 },
		"another's last": func(f *checkpoint.File) { f.CRC32C = "00000001" },
	} {
		t.Run(name, func(t *testing.T) {
			m := manifest()
			f := checkpoint.File{Path: "checkpoint/pages-9.img", SizeBytes: int64(len(data))}
			f.Blocks, f.CRC32C = blocksOf(data, 64*kib)
			change(&f)
			m.Files = append(m.Files, f)
			encoded, err := m.Encode()
			if err != nil {
				t.Fatal(err)
			}
			got, err := checkpoint.ReadManifest(bytes.NewReader(encoded))
			switch {
			case name != "" && !errors.Is(err, checkpoint.ErrCorrupt):
				t.Errorf("accepted: %v", err)
			case name == "" && (err != nil || !bytes.Equal(got.Blocks()["pages-9.img"].Blocks.CRC32C, f.Blocks.CRC32C)):
				t.Errorf("%v, %v", got, err)
			}
		})
	}
}
