package pager

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
)

const block = 64 << 10

// pagesFile writes a file of pages, and sums it as the store does.
func pagesFile(t testing.TB, dir string, size int) ([]byte, checkpoint.File) {
	t.Helper()
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{7}).Read(data)
	write(t, dir, data)
	return data, sumFile("checkpoint/pages-1.img", data)
}

func sumFile(path string, data []byte) checkpoint.File {
	f := checkpoint.File{Path: path, SizeBytes: int64(len(data)), Blocks: &checkpoint.Blocks{SizeBytes: block}}
	crc := uint32(0)
	for rest := data; len(rest) > 0; rest = rest[min(block, len(rest)):] {
		crc = crc32.Update(crc, crc32.MakeTable(crc32.Castagnoli), rest[:min(block, len(rest))])
		f.Blocks.Add(crc)
	}
	f.CRC32C = fmt.Sprintf("%08x", crc)
	return f
}

func write(t testing.TB, dir string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "pages-1.img"), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestWindow reads pieces of all sizes, in and out of order, with damage in one
// block: only what lies in that one is refused.
func TestWindow(t *testing.T) {
	dir := t.TempDir()
	data, f := pagesFile(t, dir, 9*block+3*pageSize)
	const damaged = 5
	broken := bytes.Clone(data)
	broken[damaged*block+block/2] ^= 1
	write(t, dir, broken)
	file, err := os.Open(filepath.Join(dir, "pages-1.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Sync(); err != nil { // what is not on the disk cannot be given up
		t.Fatal(err)
	}
	for name, c := range map[string]*content{
		"checked": {file, f.SizeBytes, f.Blocks}, "not checked": {file, f.SizeBytes, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var w window
			r := rand.New(rand.NewPCG(1, 2))
			refused := 0
			for range 3000 {
				off := r.Int64N(f.SizeBytes/pageSize) * pageSize
				size := min((1+r.Int64N(64))*pageSize, f.SizeBytes-off)
				got, err := w.read(c, off, size)
				if r.IntN(50) == 0 { // then a read finds the beginning in the page cache, or nothing
					from := r.Int64N(f.SizeBytes)
					unix.Fadvise(int(file.Fd()), from, f.SizeBytes-from, unix.FADV_DONTNEED)
				}
				touches := off/block <= damaged && (off+size-1)/block >= damaged
				switch {
				case c.blocks != nil && touches:
					refused++
					if !errors.Is(err, checkpoint.ErrCorrupt) || !strings.Contains(err.Error(), "pages-1.img") {
						t.Fatalf("%d bytes at %d: %v", size, off, err)
					}
				case err != nil || !bytes.Equal(got, broken[off:off+size]):
					t.Fatalf("%d bytes at %d: wrong content, or %v", size, off, err)
				}
			}
			if (refused > 0) != (c.blocks != nil) {
				t.Errorf("refused %d", refused)
			}
			if _, err := w.read(c, f.SizeBytes-pageSize, 2*pageSize); err == nil {
				t.Error("read beyond the end")
			}
		})
	}
}

// TestContentOf: what CRIU reads is checked before it starts, what the pager
// reads is left to it.
func TestContentOf(t *testing.T) {
	dir := t.TempDir()
	data, f := pagesFile(t, dir, 8*block)
	sums := map[string]checkpoint.File{"pages-1.img": f}
	// Lazy are blocks 1 and 2 but for the last page, and blocks 4 to 6, in two runs
	// that meet within block 5.
	runs := []criu.LazyRun{
		{Addr: 1 << 30, Size: block + 3*pageSize, Off: 4 * block}, {Addr: 2 << 30, Size: 2*block - 3*pageSize, Off: 5*block + 3*pageSize},
		{Addr: 3 << 30, Size: 2*block - pageSize, Off: block},
	}
	open := func() *criu.LazyMemory {
		file, err := os.Open(filepath.Join(dir, "pages-1.img"))
		if err != nil {
			t.Fatal(err)
		}
		m := &criu.LazyMemory{Tasks: []criu.LazyTask{{PID: 1, Runs: runs, Pages: file, PagesSize: f.SizeBytes}, {PID: 2, Zombie: true}}}
		t.Cleanup(func() { m.Close() })
		return m
	}
	for at, left := range []bool{false, true, false, false, true, true, true, false} {
		broken := bytes.Clone(data)
		broken[at*block] ^= 1
		write(t, dir, broken)
		contents, err := contentOf(dir, open(), sums)
		if left && (err != nil || contents[1].blocks != f.Blocks) || !left && !errors.Is(err, checkpoint.ErrCorrupt) {
			t.Errorf("damage in block %d: %v", at, err)
		}
		if _, err := contentOf(dir, open(), nil); err != nil {
			t.Errorf("without checksums: %v", err)
		}
	}
	// A file that no task has as lazy memory is CRIU's alone.
	write(t, dir, data)
	other := bytes.Clone(data)
	sums["pages-2.img"] = sumFile("checkpoint/pages-2.img", other)
	other[len(other)-1] ^= 1
	if err := os.WriteFile(filepath.Join(dir, "pages-2.img"), other, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := contentOf(dir, open(), sums); !errors.Is(err, checkpoint.ErrCorrupt) || !strings.Contains(err.Error(), "pages-2.img") {
		t.Errorf("damage in another file: %v", err)
	}
	delete(sums, "pages-2.img")
	f.SizeBytes -= pageSize
	sums["pages-1.img"] = f
	if _, err := contentOf(dir, open(), sums); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("another size: %v", err)
	}
}
