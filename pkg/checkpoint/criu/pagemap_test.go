package criu

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// lazySample is a copy of the sample, with pages of zeroes.
func lazySample(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(sample)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pages-2.img", "pages-3.img"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 33*PageSize), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestLazyMemory(t *testing.T) {
	m, err := OpenLazyMemory(lazySample(t))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if len(m.Tasks) != 3 || !m.Tasks[2].Zombie || m.Tasks[2].Pages != nil || m.Tasks[2].Runs != nil {
		t.Fatalf("tasks %+v", m.Tasks)
	}
	r, err := Inspect(sample)
	if err != nil {
		t.Fatal(err)
	}
	var sum uint64
	for i, task := range m.Tasks {
		p := r.Processes[i]
		if task.PID != p.PID || task.Zombie != (p.State == "zombie") {
			t.Errorf("task %+v", task)
		}
		var lazy, runs uint64
		for _, m := range p.Mappings {
			lazy += m.LazyBytes
		}
		end := uint64(0)
		for _, r := range task.Runs {
			if r.Addr < end || r.Size == 0 || (r.Addr|r.Size|uint64(r.Off))%PageSize != 0 || r.Off+int64(r.Size) > task.PagesSize {
				t.Errorf("run %+v after %#x, in %d bytes", r, end, task.PagesSize)
			}
			end = r.Addr + r.Size
			runs += r.Size
		}
		if runs != lazy || !task.Zombie && lazy == 0 {
			t.Errorf("process %d: runs of %d bytes, %d are lazy", task.PID, runs, lazy)
		}
		sum += runs
	}
	if m.Bytes() != sum {
		t.Errorf("%d bytes, want %d", m.Bytes(), sum)
	}
}

// TestLazyRuns reads pagemaps made up for two mappings side by side, lazy ones,
// behind one of a file.
func TestLazyRuns(t *testing.T) {
	const (
		file, first, second, end = 0x10000, 0x20000, 0x30000, 0x38000
		present                  = pagePresent
		lazy                     = pagePresent | pageLazy
	)
	entry := func(addr uint64, pages, flags uint32) *pagemap.PagemapEntry {
		return &pagemap.PagemapEntry{Vaddr: &addr, NrPages: &pages, Flags: &flags}
	}
	mapping := func(start, end uint64, flags, status uint32, madv uint64) *vma.VmaEntry {
		return &vma.VmaEntry{Start: &start, End: &end, Flags: &flags, Status: &status, Madv: &madv}
	}
	const anon = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	usual := []*vma.VmaEntry{
		mapping(file, first, unix.MAP_PRIVATE, vmaFilePrivate, 0),
		mapping(first, second, anon, vmaAnonPrivate, 0),
		mapping(second, end, anon, vmaAnonPrivate, 1<<unix.MADV_WIPEONFORK),
		mapping(second, second+PageSize, anon, vmaGuard, 0),
	}
	with := func(flags, status uint32) []*vma.VmaEntry {
		return []*vma.VmaEntry{mapping(first, end, anon|flags, vmaAnonPrivate|status, 0)}
	}
	for _, tt := range []struct {
		name    string
		vmas    []*vma.VmaEntry
		entries []*pagemap.PagemapEntry
		pages   int // in the file
		want    []LazyRun
		err     error
	}{
		{"none", usual, nil, 0, nil, nil},
		{"not lazy", usual, []*pagemap.PagemapEntry{entry(file, 4, present)}, 4, nil, nil},
		{"offsets count what is not lazy", usual, []*pagemap.PagemapEntry{entry(file, 4, present), entry(first, 2, present), entry(first+0x2000, 3, lazy)}, 9,
			[]LazyRun{{Addr: first + 0x2000, Size: 0x3000, Off: 0x6000}}, nil},
		{"over a border", usual, []*pagemap.PagemapEntry{entry(second-0x1000, 3, lazy)}, 3,
			[]LazyRun{{Addr: second - 0x1000, Size: 0x1000}, {Addr: second, Size: 0x2000, Off: 0x1000, NotInherited: true}}, nil},
		{"nothing there", usual, []*pagemap.PagemapEntry{entry(first, 1, 0), entry(first+0x1000, 1, lazy)}, 1,
			[]LazyRun{{Addr: first + 0x1000, Size: 0x1000}}, nil},
		{"all", usual, []*pagemap.PagemapEntry{entry(first, 24, lazy)}, 24,
			[]LazyRun{{Addr: first, Size: 0x10000}, {Addr: second, Size: 0x8000, Off: 0x10000, NotInherited: true}}, nil},

		{"beyond the end", usual, []*pagemap.PagemapEntry{entry(first, 25, lazy)}, 25, nil, checkpoint.ErrCorrupt},
		{"no mapping", usual, []*pagemap.PagemapEntry{entry(end, 1, lazy)}, 1, nil, checkpoint.ErrCorrupt},
		{"before the mapping", usual[1:], []*pagemap.PagemapEntry{entry(first-0x1000, 2, lazy)}, 2, nil, checkpoint.ErrCorrupt},
		{"of a file", usual, []*pagemap.PagemapEntry{entry(first-0x1000, 2, lazy)}, 2, nil, checkpoint.ErrCorrupt},
		{"locked", with(unix.MAP_LOCKED, 0), []*pagemap.PagemapEntry{entry(first, 1, lazy)}, 1, nil, checkpoint.ErrCorrupt},
		{"huge pages", with(unix.MAP_HUGETLB, 0), []*pagemap.PagemapEntry{entry(first, 1, lazy)}, 1, nil, checkpoint.ErrCorrupt},
		{"vdso", with(0, vmaVdso), []*pagemap.PagemapEntry{entry(first, 1, lazy)}, 1, nil, checkpoint.ErrCorrupt},
		{"file too short", usual, []*pagemap.PagemapEntry{entry(first, 2, lazy)}, 1, nil, checkpoint.ErrCorrupt},
		{"no file", usual, []*pagemap.PagemapEntry{entry(first, 2, lazy)}, -1, nil, checkpoint.ErrCorrupt},
		{"runs that overlap", usual, []*pagemap.PagemapEntry{entry(first, 2, lazy), entry(first+0x1000, 2, lazy)}, 4, nil, checkpoint.ErrCorrupt},
		{"not of whole pages", usual, []*pagemap.PagemapEntry{entry(first+8, 2, lazy)}, 4, nil, checkpoint.ErrCorrupt},
		{"mappings that overlap", []*vma.VmaEntry{usual[2], usual[1]}, nil, 0, nil, checkpoint.ErrCorrupt},
		{"mapping not of whole pages", []*vma.VmaEntry{mapping(first, second+8, anon, vmaAnonPrivate, 0)}, nil, 0, nil, checkpoint.ErrCorrupt},

		{"in the parent", usual, []*pagemap.PagemapEntry{entry(first, 1, pageParent)}, 0, nil, errdefs.ErrNotImplemented},
		{"lazy, in the parent", usual, []*pagemap.PagemapEntry{entry(first, 1, pageParent|lazy)}, 1, nil, errdefs.ErrNotImplemented},
		{"of a lazy dump", usual, []*pagemap.PagemapEntry{entry(first, 1, pageLazy)}, 0, nil, errdefs.ErrNotImplemented},
		{"memory that may be dropped", with(mapDroppable, 0), nil, 0, nil, errdefs.ErrNotImplemented},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := lazySample(t)
			edit(t, dir, "mm-7.img", magicMM, new(mm.MmEntry), func(e *mm.MmEntry) { e.Vmas = tt.vmas })
			messages := []proto.Message{&pagemap.PagemapHead{PagesId: proto.Uint32(9)}}
			for _, e := range tt.entries {
				messages = append(messages, e)
			}
			write(t, filepath.Join(dir, "pagemap-7.img"), encode(t, magicPagemap, messages...))
			if tt.pages >= 0 {
				write(t, filepath.Join(dir, "pages-9.img"), make([]byte, tt.pages*PageSize))
			}
			m, err := OpenLazyMemory(dir)
			if !errors.Is(err, tt.err) || (err == nil) != (tt.err == nil) {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			if err != nil {
				return
			}
			defer m.Close()
			got := m.Tasks[1]
			if len(got.Runs) != len(tt.want) || (got.Pages == nil) != (len(tt.want) == 0) {
				t.Fatalf("runs %+v", got.Runs)
			}
			for i, r := range got.Runs {
				if r != tt.want[i] {
					t.Errorf("run %+v, want %+v", r, tt.want[i])
				}
			}
		})
	}
}

// TestLazyMemoryLinks refuses pages that are a link or wait for a writer.
func TestLazyMemoryLinks(t *testing.T) {
	for _, make := range []func(string) error{
		func(name string) error { return os.Symlink("/dev/zero", name) },
		func(name string) error { return unix.Mkfifo(name, 0o600) },
		func(name string) error { return os.Mkdir(name, 0o700) },
	} {
		dir := lazySample(t)
		name := filepath.Join(dir, "pages-2.img")
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
		if err := make(name); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenLazyMemory(dir); !errors.Is(err, checkpoint.ErrCorrupt) {
			t.Errorf("error %v", err)
		}
	}
}

// FuzzLazyMemory puts the bytes in place of what the pager reads.
func FuzzLazyMemory(f *testing.F) {
	names := []string{"pstree.img", "core-7.img", "mm-7.img", "pagemap-7.img"}
	dir := lazySample(f)
	for i, n := range names {
		b, err := os.ReadFile(filepath.Join(dir, n))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(i), b)
	}
	f.Fuzz(func(t *testing.T, i uint8, b []byte) {
		name := filepath.Join(dir, names[int(i)%len(names)])
		was, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		defer os.WriteFile(name, was, 0o600)
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := OpenLazyMemory(dir)
		if err != nil {
			if !errors.Is(err, checkpoint.ErrCorrupt) && !errors.Is(err, errdefs.ErrNotImplemented) && !absent(err) {
				t.Fatal(err)
			}
			return
		}
		defer m.Close()
		for _, task := range m.Tasks {
			end := uint64(0)
			for _, r := range task.Runs {
				if r.Addr < end || r.Size == 0 || r.Addr+r.Size <= r.Addr || r.Off < 0 || r.Off+int64(r.Size) > task.PagesSize ||
					(r.Addr|r.Size|uint64(r.Off))%PageSize != 0 {
					t.Fatalf("run %+v after %#x", r, end)
				}
				end = r.Addr + r.Size
			}
		}
	})
}
