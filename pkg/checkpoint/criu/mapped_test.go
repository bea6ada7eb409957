package criu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/timerfd"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// samplePages are those of each process of the sample.
const samplePages = 33

// jvmImages are the images of the sample, whose program is called libjvm.so in them,
// with pages that differ.
func jvmImages(t *testing.T) string {
	images := copyImages(t)
	for _, name := range []string{"pages-2.img", "pages-3.img"} {
		var data []byte
		for i := range 64 {
			data = append(data, bytes.Repeat(fmt.Appendf(nil, "%-16s", fmt.Sprint(name, i)), PageSize/16)...)
		}
		write(t, filepath.Join(images, name), data[:samplePages*PageSize])
	}
	edit(t, images, "files.img", magicFiles, new(fdinfo.FileEntry), func(e *fdinfo.FileEntry) {
		if e.GetReg().GetName() == "/app" {
			e.Reg.Name = proto.String("/usr/lib/jvm/server/libjvm.so")
		}
		if e.Pipe != nil { // as well a timer that waits to be read
			e.Type, e.Pipe = fdinfo.FdTypes_TIMERFD.Enum(), nil
			e.Tfd = &timerfd.TimerfdEntry{Id: e.Id, Isec: proto.Uint64(1), Ticks: proto.Uint64(2)}
		}
	})
	return images
}

// pagesOf are the pages with content that a restore of a process from dir would
// leave, by their addresses; what is mapped comes from images.
func pagesOf(t *testing.T, dir, images string, pid uint32) map[uint64]string {
	t.Helper()
	d, err := openImages(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	out := map[uint64]string{}
	put := func(addr uint64, data []byte) {
		for ; len(data) > 0; addr, data = addr+PageSize, data[PageSize:] {
			if _, ok := out[addr]; ok {
				t.Fatalf("process %d: page %#x twice", pid, addr)
			}
			out[addr] = string(data[:PageSize])
		}
	}
	var e mm.MmEntry
	if err := d.one(&e, fmt.Sprintf("mm-%d.img", pid), magicCommon, magicMM); err != nil {
		t.Fatal(err)
	}
	files := map[uint32]string{}
	if err := each(d, "files.img", magicFiles, new(fdinfo.FileEntry), func(f *fdinfo.FileEntry) error {
		files[f.GetId()] = f.GetReg().GetName()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	type at struct{ addr, off, size uint64 }
	var runs []at
	off := uint64(0)
	id, err := d.pagemap(fmt.Sprintf("pagemap-%d.img", pid), func(r run) error {
		if r.flags&pagePresent != 0 {
			runs = append(runs, at{r.addr, off, r.pages * PageSize})
			off += r.pages * PageSize
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	pages := fmt.Sprintf("pages-%d.img", id)
	data, err := os.ReadFile(filepath.Join(dir, pages))
	if err != nil || uint64(len(data)) != off {
		t.Fatalf("%s: %d bytes, want %d; %v", pages, len(data), off, err)
	}
	for _, r := range runs {
		put(r.addr, data[r.off:r.off+r.size])
	}
	original, err := os.ReadFile(filepath.Join(images, pages))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range e.GetVmas() {
		if v.GetStatus()&vmaFilePrivate == 0 || !strings.HasPrefix(files[uint32(v.GetShmid())], fmt.Sprintf("/%s%d-", mappedKey, pid)) {
			continue
		}
		if v.GetFlags()&unix.MAP_ANONYMOUS != 0 || v.GetStatus()&vmaAnonPrivate != 0 || v.GetFdflags() != unix.O_RDONLY {
			t.Errorf("process %d: mapping %v", pid, v)
		}
		put(v.GetStart(), original[v.GetPgoff():v.GetPgoff()+v.GetEnd()-v.GetStart()])
	}
	return out
}

// covered are the addresses of the mappings, each with its protection, joined where
// they are next to each other and alike.
func covered(t *testing.T, dir string, pid uint32) (out []string) {
	t.Helper()
	d, err := openImages(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var e mm.MmEntry
	if err := d.one(&e, fmt.Sprintf("mm-%d.img", pid), magicCommon, magicMM); err != nil {
		t.Fatal(err)
	}
	var last *vma.VmaEntry
	for _, v := range e.GetVmas() {
		if last != nil && last.GetEnd() == v.GetStart() && last.GetProt() == v.GetProt() {
			out = out[:len(out)-1]
			v.Start = last.Start
		}
		out = append(out, fmt.Sprintf("%#x-%#x %d", v.GetStart(), v.GetEnd(), v.GetProt()))
		last = v
	}
	return out
}

// TestMappedMemory: what a restore would find in memory is what was dumped, page by
// page, though the large runs are mapped from the original; where nothing was, there
// is nothing of a file.
func TestMappedMemory(t *testing.T) {
	for name, images := range map[string]string{"as it is": jvmImages(t), "in pieces": inPieces(t, jvmImages(t))} {
		t.Run(name, func(t *testing.T) { testMappedMemory(t, images) })
	}
}

// inPieces divides the runs of 64 KiB, as CRIU does with large ones.
func inPieces(t *testing.T, images string) string {
	d, err := openImages(images)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, pid := range []int{1, 7} {
		name := fmt.Sprintf("pagemap-%d.img", pid)
		var entries []proto.Message
		id, err := d.pagemap(name, func(r run) error {
			if r.pages == 16 {
				entries = append(entries, pagemapEntry(r.addr, 5, r.flags), pagemapEntry(r.addr+5*PageSize, 1, r.flags))
				r.addr, r.pages = r.addr+6*PageSize, 10
			}
			entries = append(entries, pagemapEntry(r.addr, r.pages, r.flags))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(images, name), encode(t, magicPagemap, append([]proto.Message{&pagemap.PagemapHead{PagesId: &id}}, entries...)...))
	}
	return images
}

// layOut lays images out to be mapped.
func layOut(t *testing.T, images string) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "mapped")
	if err := LayOutMapped(t.Context(), images, dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// followed is a copy of a view as CRIU reads it, without links.
func followed(t *testing.T, view string) string {
	t.Helper()
	out := t.TempDir()
	entries, err := os.ReadDir(view)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(view, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(out, e.Name()), data)
	}
	return out
}

func testMappedMemory(t *testing.T, images string) {
	dir := layOut(t, images)
	m, err := OpenMappedMemory(dir)
	if err != nil {
		t.Fatal(err)
	}
	// Of each process 64 KiB at 0x7fc12e419000, in two pieces.
	if len(m.Files) != 2 || m.Segments != 4 || m.Bytes != 128<<10 {
		t.Errorf("%d files, %d segments, %d bytes", len(m.Files), m.Segments, m.Bytes)
	}
	for _, merge := range []bool{false, true} {
		view := viewOf(t, images)
		if err := errors.Join(SetMergeable(images, view, merge), m.Use(view, merge)); err != nil {
			t.Fatal(err)
		}
		view = followed(t, view)
		rearmed, offered := false, false
		edit(t, view, filesImage, magicFiles, new(fdinfo.FileEntry), func(e *fdinfo.FileEntry) {
			rearmed = rearmed || e.GetTfd().GetVnsec() == 1
		})
		edit(t, view, "mm-1.img", magicMM, new(mm.MmEntry), func(e *mm.MmEntry) {
			for _, v := range e.GetVmas() {
				offered = offered || v.GetMadv()&(1<<unix.MADV_MERGEABLE) != 0
			}
		})
		if !rearmed {
			t.Error("a timer that had expired stays stopped")
		}
		if offered != merge {
			t.Errorf("memory is offered: %v, want %v", offered, merge)
		}
		for i, pid := range []uint32{1, 7} {
			before, after := pagesOf(t, images, images, pid), pagesOf(t, view, images, pid)
			if len(before) < 20 || !maps.Equal(before, after) {
				t.Errorf("process %d: %d pages before, %d after, or other ones", pid, len(before), len(after))
			}
			if b, a := covered(t, images, pid), covered(t, view, pid); !slices.Equal(b, a) {
				t.Errorf("process %d: mappings before\n%s\nafter\n%s", pid, strings.Join(b, "\n"), strings.Join(a, "\n"))
			}
			left, err := os.Stat(filepath.Join(dir, m.Files[i].Name))
			if err != nil || left.Mode() != 0o600 || left.Size() != int64(len(before)-16)*PageSize {
				t.Errorf("process %d: %v, %v, of %d pages", pid, left, err, len(before))
			}
		}
	}
	// Nothing was written through a link.
	for _, f := range m.Files {
		if st, err := os.Stat(filepath.Join(images, f.Name)); err != nil || st.Size() != samplePages*PageSize {
			t.Errorf("the original was changed: %v, %v", st, err)
		}
	}
}

// TestOpenMappedMemory: what is damaged, missing or of another version is no reason to
// map anything, and nothing is used but what is expected.
func TestOpenMappedMemory(t *testing.T) {
	in := func(name string, f func(string) error) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			if err := f(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	index := func(s string) func(t *testing.T, dir string) {
		return in(MappedIndex, func(name string) error { return os.WriteFile(name, []byte(s), 0o600) })
	}
	files := func(s string) func(t *testing.T, dir string) { return index(`{"files":[` + s + `]}`) }
	const first, second = `{"name":"pages-2.img","keys":["stasis-memory-1-0","stasis-memory-1-1"]}`, `{"name":"pages-3.img","keys":["stasis-memory-7-0","stasis-memory-7-1"]}`
	rename := func(from, to string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			edit(t, dir, filesImage, magicFiles, new(fdinfo.FileEntry), func(e *fdinfo.FileEntry) {
				if e.GetReg().GetName() == from {
					e.Reg.Name = proto.String(to)
				}
			})
		}
	}
	for name, tc := range map[string]struct {
		damage func(t *testing.T, dir string)
		want   error
		text   string
	}{
		"as it was":             {files(first + "," + second), nil, ""},
		"none":                  {in("", os.RemoveAll), errdefs.ErrNotImplemented, "made without images for that"},
		"of other rules":        {in(MappedIndex, os.Remove), errdefs.ErrNotImplemented, "made without images for that"},
		"a reason":              {index(`{"reason":"it has\u001b wings"}`), errdefs.ErrNotImplemented, "it has? wings"},
		"no files":              {files(""), checkpoint.ErrCorrupt, "no files"},
		"a path":                {files(first + "," + strings.Replace(second, "pages-3", "../pages-3", 1)), checkpoint.ErrCorrupt, "file"},
		"more than a name":      {files(first + "," + strings.Replace(second, "3.img", "3.img/../x", 1)), checkpoint.ErrCorrupt, "file"},
		"a file twice":          {files(first + "," + strings.Replace(second, "pages-3", "pages-2", 1)), checkpoint.ErrCorrupt, "file"},
		"another key":           {files(first + "," + strings.Replace(second, "7-0", "7-0 x", 1)), checkpoint.ErrCorrupt, "key"},
		"a key less":            {files(first + "," + strings.Replace(second, `,"stasis-memory-7-1"`, "", 1)), checkpoint.ErrCorrupt, "1 keys"},
		"a key of another":      {files(first + "," + strings.Replace(second, "7-1", "1-1", 1)), checkpoint.ErrCorrupt, "key"},
		"a key twice":           {files(first + "," + strings.ReplaceAll(second, "memory-7", "memory-1")), checkpoint.ErrCorrupt, "key"},
		"no JSON":               {index("rules"), checkpoint.ErrCorrupt, MappedIndex},
		"more after it":         {index(`{"files":[` + first + "," + second + `]} {}`), checkpoint.ErrCorrupt, MappedIndex},
		"too large":             {in(MappedIndex, func(name string) error { return os.Truncate(name, maxMappedIndex+1) }), checkpoint.ErrCorrupt, MappedIndex},
		"an image less":         {in("pagemap-7.img", os.Remove), checkpoint.ErrCorrupt, "of 7 images 6"},
		"a process less":        {files(first), checkpoint.ErrCorrupt, "none of its files"},
		"an image more":         {in("core-1.img", func(name string) error { return os.WriteFile(name, nil, 0o600) }), checkpoint.ErrCorrupt, "none of its files"},
		"memory that is none":   {rename("/stasis-memory-1-1", "/stasis-memory-8-1"), checkpoint.ErrCorrupt, "stasis-memory-8-1"},
		"memory from elsewhere": {rename("/stasis-memory-1-1", "/tmp/x"), checkpoint.ErrCorrupt, "1 files of memory"},
		"a file climbs out":     {rename("/usr/lib/jvm/server/libjvm.so", "/../etc/shadow"), checkpoint.ErrIncompatible, "open file"},
		"a link": {in(MappedIndex, func(name string) error {
			return errors.Join(os.Rename(name, name+"2"), os.Symlink(MappedIndex+"2", name))
		}), checkpoint.ErrCorrupt, MappedIndex},
		"a link for an image": {in("mm-1.img", func(name string) error {
			return errors.Join(os.Remove(name), os.Symlink("mm-7.img", name))
		}), checkpoint.ErrCorrupt, "mm-1.img"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := layOut(t, jvmImages(t))
			tc.damage(t, dir)
			_, err := OpenMappedMemory(dir)
			if !errors.Is(err, tc.want) || err != nil && !strings.Contains(err.Error(), tc.text) {
				t.Errorf("%v, want %v with %q", err, tc.want, tc.text)
			}
		})
	}
}

// TestLayOutFails: nothing of what could not be written is left, but the reason.
func TestLayOutFails(t *testing.T) {
	images := jvmImages(t)
	// Both processes have the same file of pages, which can be written once.
	data, err := os.ReadFile(filepath.Join(images, "pagemap-7.img"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(images, "pagemap-1.img"), data)
	dir := layOut(t, images)
	if _, err := OpenMappedMemory(dir); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "pages-3.img") {
		t.Error(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 || entries[0].Name() != MappedIndex {
		t.Errorf("%v, %v", entries, err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(io.ErrClosedPipe)
	if err := LayOutMapped(ctx, images, filepath.Join(t.TempDir(), "mapped")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("given up: %v", err)
	}
}

// TestMappedPieces: where malloc may have blocks no mapping, nor several that the kernel
// would join, is as large as a block.
func TestMappedPieces(t *testing.T) {
	images := jvmImages(t)
	const start, pages = 1<<46 + 5*PageSize, 300
	id := uint32(2)
	write(t, filepath.Join(images, "pages-2.img"), make([]byte, (pages+1)*PageSize))
	edit(t, images, "mm-1.img", magicMM, new(mm.MmEntry), func(e *mm.MmEntry) {
		add := func(start, end uint64, flags uint32) {
			v := proto.CloneOf(e.Vmas[7]) // any, to be one of its own
			v.Start, v.End, v.Flags, v.Status = &start, &end, proto.Uint32(unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|flags), proto.Uint32(1|vmaAnonPrivate)
			i := slices.IndexFunc(e.Vmas, func(v *vma.VmaEntry) bool { return v.GetStart() > start })
			e.Vmas = slices.Insert(e.Vmas, i, v)
		}
		add(1<<46, start, unix.MAP_LOCKED)
		add(start, start+50*PageSize, 0) // neighbours, as the kernel has them where they differ in something else
		add(start+50*PageSize, start+pages*PageSize, 0)
	})
	write(t, filepath.Join(images, "pagemap-1.img"), encode(t, magicPagemap, &pagemap.PagemapHead{PagesId: &id}, pagemapEntry(1<<46, 1, pagePresent),
		pagemapEntry(start, 100, pagePresent|pageLazy), pagemapEntry(start+100*PageSize, pages-100, pagePresent|pageLazy)))
	dir := layOut(t, images)
	if _, err := OpenMappedMemory(dir); err != nil {
		t.Fatal(err)
	}
	names := map[uint64]string{}
	edit(t, dir, filesImage, magicFiles, new(fdinfo.FileEntry), func(e *fdinfo.FileEntry) {
		names[uint64(e.GetId())] = e.GetReg().GetName()
	})
	mapped, joined, last := uint64(0), uint64(0), new(vma.VmaEntry)
	edit(t, dir, "mm-1.img", magicMM, new(mm.MmEntry), func(e *mm.MmEntry) {
		for _, v := range e.GetVmas() {
			if v.GetStart() < start || v.GetStart() >= start+pages*PageSize || v.GetStatus()&vmaFilePrivate == 0 {
				continue
			}
			size := v.GetEnd() - v.GetStart()
			if mapped += size; last.GetEnd() == v.GetStart() && names[last.GetShmid()] == names[v.GetShmid()] {
				joined += size
			} else {
				joined = size
			}
			if last = v; joined > 124<<10 {
				t.Errorf("%#x-%#x of %s: the kernel makes %d KiB of it and what is before it", v.GetStart(), v.GetEnd(), names[v.GetShmid()], joined>>10)
			}
		}
	})
	if mapped < (pages-2*3)*PageSize { // ends of less than four pages are left
		t.Errorf("%d KiB of %d are mapped", mapped>>10, pages*PageSize>>10)
	}
}

// TestPiecesStay: the kernel joins what is mapped from one descriptor, and mremap then
// enlarges it; pieces from several it leaves apart, and refuses.
func TestPiecesStay(t *testing.T) {
	name := filepath.Join(t.TempDir(), "pages")
	write(t, name, make([]byte, 16*PageSize))
	var fds []int
	for range descriptors {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		fds = append(fds, int(f.Fd()))
	}
	const size = 4 * PageSize
	for _, n := range []int{1, descriptors} {
		base, err := unix.MmapPtr(-1, 0, nil, size, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 4 {
			_, err := unix.MmapPtr(fds[i%n], int64(i*PageSize), unsafe.Add(base, i*PageSize), PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_FIXED)
			if err != nil {
				t.Fatal(err)
			}
		}
		moved, err := unix.MremapPtr(base, size, nil, 2*size, unix.MREMAP_MAYMOVE)
		if n == 1 && err == nil {
			err = unix.MunmapPtr(moved, 2*size)
		} else if n > 1 && errors.Is(err, unix.EFAULT) {
			err = unix.MunmapPtr(base, size)
		} else {
			err = fmt.Errorf("%v, %v", moved, err)
		}
		if err != nil {
			t.Errorf("from %d descriptors: %v", n, err)
		}
	}
}

// TestMappedSplit: what is left of a private file is where it was in the file, and
// nothing of a mapping is lost.
func TestMappedSplit(t *testing.T) {
	v := func(start, end, pgoff, shmid uint64, flags, status uint32) *vma.VmaEntry {
		return &vma.VmaEntry{Start: &start, End: &end, Pgoff: &pgoff, Shmid: &shmid, Flags: &flags, Status: &status, Prot: proto.Uint32(3), Fd: proto.Int64(-1)}
	}
	const anon = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	task := mappedTask{fileID: 9, mm: &mm.MmEntry{Vmas: []*vma.VmaEntry{
		v(0x10000, 0x40000, 0x5000, 4, unix.MAP_PRIVATE, 1|vmaFilePrivate),
		v(0x40000, 0x50000, 0, 0, anon, 1|vmaAnonPrivate),
		v(0x60000, 0x70000, 0, 0, anon, 1|vmaAnonPrivate),
		v(0x61000, 0x62000, 0, 0, anon, vmaGuard),
	}}, runs: []mappedRun{{0x18000, 0x8000, 0x1000, 0}, {0x30000, 0x10000, 0x9000, 1}, {0x40000, 0x8000, 0x19000, 0}}}
	var got []string
	for _, p := range task.split() {
		got = append(got, fmt.Sprintf("%x-%x %x of %x, flags %x, status %x", p.GetStart(), p.GetEnd(), p.GetPgoff(), p.GetShmid(), p.GetFlags(), p.GetStatus()))
	}
	want := []string{
		"10000-18000 5000 of 4, flags 2, status 41",
		"18000-20000 1000 of 9, flags 2, status 41",
		"20000-30000 15000 of 4, flags 2, status 41",
		"30000-40000 9000 of a, flags 2, status 41",
		"40000-48000 19000 of 9, flags 2, status 41",
		"48000-50000 0 of 0, flags 22, status 201",
		"60000-70000 0 of 0, flags 22, status 201",
		"61000-62000 0 of 0, flags 22, status 10000",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestMayHaveBlocks: pages are left out where malloc may have large blocks, and not
// where the virtual machine has its heap.
func TestMayHaveBlocks(t *testing.T) {
	const anon, high = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS, 0x7f0000000000
	for name, tc := range map[string]struct {
		start               uint64
		prot, flags, status uint32
		want                bool
	}{
		"a block":            {high, 3, anon, 1 | vmaAnonPrivate, true},
		"bottom up":          {0x2aaaaaaab000, 3, anon, 1 | vmaAnonPrivate, true},
		"read-only":          {high, 1, anon, 1 | vmaAnonPrivate, true},
		"heap of objects":    {0xe0000000, 3, anon, 1 | vmaAnonPrivate, false},
		"brk":                {0x555555554000, 3, anon, 1 | vmaAnonPrivate | vmaHeap, false},
		"compiled code":      {high, 7, anon, 1 | vmaAnonPrivate, false},
		"an arena":           {high, 3, anon | unix.MAP_NORESERVE, 1 | vmaAnonPrivate, false},
		"archive of classes": {high, 3, unix.MAP_PRIVATE, 1 | vmaFilePrivate, false},
	} {
		v := &vma.VmaEntry{Start: &tc.start, End: proto.Uint64(tc.start + 1<<20), Prot: &tc.prot, Flags: &tc.flags, Status: &tc.status}
		if !canBeMapped(v) {
			t.Errorf("%s: cannot be mapped", name)
		}
		if got := mayHaveBlocks(v); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestMappedMemoryRefused: what may rely on memory that is anonymous is left alone,
// with a reason, and so is what does not fit together.
func TestMappedMemoryRefused(t *testing.T) {
	rename := func(from, to string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			edit(t, dir, "files.img", magicFiles, new(fdinfo.FileEntry), func(e *fdinfo.FileEntry) {
				if e.GetReg().GetName() == from {
					e.Reg.Name = proto.String(to)
				}
			})
		}
	}
	editMM := func(f func(v *vma.VmaEntry)) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			for _, pid := range []int{1, 7} {
				edit(t, dir, fmt.Sprintf("mm-%d.img", pid), magicMM, new(mm.MmEntry), func(e *mm.MmEntry) {
					for _, v := range e.GetVmas() {
						f(v)
					}
				})
			}
		}
	}
	const large = 0x7fc12e419000 // the mapping with the run that is mapped
	for name, tc := range map[string]struct {
		damage func(t *testing.T, dir string)
		want   error
		text   string
	}{
		"no virtual machine": {rename("/usr/lib/jvm/server/libjvm.so", "/app"), errdefs.ErrNotImplemented, "no Java virtual machine"},
		"an allocator":       {rename("/tmp/locked", "/usr/lib/libjemalloc.so.2"), nil, ""}, // a shared mapping is no library
		"its key is taken":   {rename("/tmp/locked", "/stasis-memory-1"), errdefs.ErrNotImplemented, "a file is called"},
		"wiped on fork": {editMM(func(v *vma.VmaEntry) {
			if v.GetStart() == large {
				v.Madv = proto.Uint64(1 << unix.MADV_WIPEONFORK)
			}
		}), errdefs.ErrNotImplemented, "no memory for that"},
		"locked": {editMM(func(v *vma.VmaEntry) {
			if v.GetStart() == large {
				v.Flags = proto.Uint32(v.GetFlags() | unix.MAP_LOCKED)
			}
		}), errdefs.ErrNotImplemented, "no memory for that"},
		"grows down": {editMM(func(v *vma.VmaEntry) {
			if v.GetStart() == large {
				v.Flags = proto.Uint32(v.GetFlags() | unix.MAP_GROWSDOWN)
			}
		}), errdefs.ErrNotImplemented, "no memory for that"},
		"all is mapped": {func(t *testing.T, dir string) {
			for _, pid := range []int{1, 7} {
				name := fmt.Sprintf("pagemap-%d.img", pid)
				id := uint32(pid/7 + 2)
				write(t, filepath.Join(dir, name), encode(t, magicPagemap, &pagemap.PagemapHead{PagesId: &id}, pagemapEntry(large, 7, pagePresent|pageLazy)))
			}
		}, errdefs.ErrNotImplemented, "all of its memory"},
		"too much is left": {func(t *testing.T, dir string) {
			id, pages := uint32(2), uint64(maxLeft/PageSize)
			write(t, filepath.Join(dir, "pagemap-1.img"), encode(t, magicPagemap, &pagemap.PagemapHead{PagesId: &id},
				pagemapEntry(1<<46, pages, pagePresent), pagemapEntry(large, 16, pagePresent|pageLazy)))
			edit(t, dir, "mm-1.img", magicMM, new(mm.MmEntry), func(e *mm.MmEntry) {
				locked := proto.CloneOf(e.Vmas[7]) // any, to be one of its own
				locked.Start, locked.End = proto.Uint64(1<<46), proto.Uint64(1<<46+pages*PageSize)
				locked.Flags, locked.Status = proto.Uint32(unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_LOCKED), proto.Uint32(1|vmaAnonPrivate)
				i := slices.IndexFunc(e.Vmas, func(v *vma.VmaEntry) bool { return v.GetStart() > 1<<46 })
				e.Vmas = slices.Insert(e.Vmas, i, locked)
			})
			if err := os.Truncate(filepath.Join(dir, "pages-2.img"), 1<<30); err != nil {
				t.Fatal(err)
			}
		}, errdefs.ErrNotImplemented, "cannot be mapped"},
		"short pages": {func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, "pages-3.img"), 4096); err != nil {
				t.Fatal(err)
			}
		}, errdefs.ErrNotImplemented, "pages-3.img: 4096 bytes"},
		"a link for pages": {func(t *testing.T, dir string) {
			name := filepath.Join(dir, "pages-2.img")
			if err := errors.Join(os.Remove(name), os.Symlink("/dev/zero", name)); err != nil {
				t.Fatal(err)
			}
		}, errdefs.ErrNotImplemented, "open pages-2.img"},
	} {
		t.Run(name, func(t *testing.T) {
			images := jvmImages(t)
			tc.damage(t, images)
			dir := filepath.Join(t.TempDir(), "mapped")
			err := LayOutMapped(t.Context(), images, dir)
			if err == nil {
				_, err = OpenMappedMemory(dir)
			}
			if !errors.Is(err, tc.want) || err != nil && !strings.Contains(err.Error(), tc.text) {
				t.Errorf("%v, want %v with %q", err, tc.want, tc.text)
			}
		})
	}

	// An allocator that is a library of the process.
	images := jvmImages(t)
	edit(t, images, "mm-1.img", magicMM, new(mm.MmEntry), func(e *mm.MmEntry) {
		for _, v := range e.GetVmas() {
			if v.GetStatus()&vmaFileShared != 0 {
				v.Status = proto.Uint32(v.GetStatus()&^vmaFileShared | vmaFilePrivate)
			}
		}
	})
	last := "/tmp/locked"
	for _, library := range []string{"/usr/lib/libjemalloc.so.2", "/opt/java/lib/default/libj9vm29.so"} {
		rename(last, library)(t, images)
		last = library
		m, err := OpenMappedMemory(layOut(t, images))
		if err != nil {
			t.Fatal(err) // the other process can be mapped
		}
		if len(m.Files) != 1 || m.Files[0].Keys[0] != "stasis-memory-7-0" {
			t.Errorf("%s: %+v", library, m.Files)
		}
	}
}
