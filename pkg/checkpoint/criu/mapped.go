package criu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/regfile"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

const (
	// minMapped is the size from which on a run is mapped. A mapping costs the
	// kernel 200 bytes and CRIU some microseconds, as copying 16 KiB does.
	minMapped = 16 << 10
	// maxMappedVMAs bounds the mappings of a process that is restored so. The kernel
	// allows 65530 (vm.max_map_count), of which the process needs some itself. For up to
	// half of them CRIU has a descriptor open until all are there (criu/mem.c: open_vmas).
	maxMappedVMAs = 1 << 14
	// maxLeft bounds the bytes that are left for CRIU to read, for they are copied.
	maxLeft = 64 << 20
	// mremapEvery is the size from which on no mapping is one where malloc may have
	// blocks of its own, see [MappedMemory]. A block is larger: DEFAULT_MMAP_THRESHOLD_MIN
	// of glibc and MMAP_THRESHOLD of musl are 128 KiB with the heads of blocks.
	mremapEvery = 124 << 10
	// mappedKey begins the names by which CRIU is given files of pages.
	mappedKey = "stasis-memory-"
)

// MappedMemory is a restore in which the memory of Java virtual machines is not read:
// each run of pages in the images becomes a private mapping of the file that holds
// it. Nothing is copied before a page is written to, and what nobody writes to is
// there once, in the page cache, for all that were restored from it.
//
// Its images are laid out once, by [LayOutMapped], when a template is made, and are the
// same for all that begin from it.
//
// It differs from what was dumped in two things that programs may notice.
//
// madvise(MADV_DONTNEED) brings back what was in the image, not zeroes, or, where a
// file was mapped, not what is in that. HotSpot and
// the allocators of glibc and musl do not rely on zeroes there: memory that is given
// back HotSpot maps anew (os_linux.cpp, pd_commit_memory and pd_uncommit_memory), and
// calloc clears all that was ever in use (malloc.c, __libc_calloc: mprotect_size).
// Other allocators do, jemalloc for one (pages.c, pages_purge_forced), and other virtual
// machines may. So it is for processes that run HotSpot's libjvm.so and none of these.
//
// mremap that makes a mapping larger would bring more of the file, and beyond its end
// SIGBUS. realloc calls it for large blocks. So no block is one mapping: in memory where
// there may be any, the file is mapped in pieces that are smaller, from two descriptors in
// turn that were opened each by itself, so that the kernel does not join them (mm/vma.c:
// is_mergeable_vma). It refuses to enlarge several mappings at once (mm/mremap.c:
// check_prep_vma), and realloc copies the block.
type MappedMemory struct {
	// Files hold memory. None may change as long as a process lives that was
	// restored from it.
	Files []MappedFile `json:"files,omitempty"`
	// Bytes and Segments are what is mapped, in how many mappings.
	Bytes    uint64 `json:"bytes,omitempty"`
	Segments int    `json:"segments,omitempty"`

	dir    string   // as laid out
	images []string // in it
}

// MappedFile is a file of an image directory that a restore is to be given as
// descriptors, see [ConfigOptions.InheritFD].
type MappedFile struct {
	Name string `json:"name"`
	// Keys are of letters, digits and "-"; for each the file must be opened anew.
	Keys []string `json:"keys"`
}

// MappedIndex is the file that says what is in a directory for mapped memory. The number in
// it is of the rules by which that was laid out, and is raised with each change of them:
// what is mapped, how, and whatever else is done to these images before a restore
// ([RearmTimers], [SetMergeable]), for none of that is done again.
const MappedIndex = "index-1.json"

// maxMappedIndex bounds the index; each process has a file in it.
const maxMappedIndex = 8 << 20

// indexOfMapped is the content of the index.
type indexOfMapped struct {
	// Reason is why nothing is mapped.
	Reason string `json:"reason,omitempty"`
	MappedMemory
}

// mappedTask is a process of which runs are mapped.
type mappedTask struct {
	pid     uint32
	mm      *mm.MmEntry
	runs    []mappedRun // sorted by address
	left    uint64      // bytes of the other pages
	pages   *os.File
	pagesID uint32
	fileID  uint32 // of the first descriptor; those of the others follow
}

// mappedRun is memory within one mapping whose content lies in one piece in the file
// of pages.
type mappedRun struct {
	addr, size uint64
	off        uint64
	descriptor uint32 // of those of the file
}

func (r mappedRun) end() uint64 { return r.addr + r.size }

// goesOn tells whether the kernel would join the mapping of another run with this one.
func (r mappedRun) goesOn(next mappedRun) bool {
	return r.end() == next.addr && r.off+r.size == next.off && r.descriptor == next.descriptor
}

// LayOutMapped makes dir, mode 0700, with the images that differ where the memory in
// imageDir is mapped, for [OpenMappedMemory], or with the reason why nothing can be. The
// image directory must hold the images themselves, see [OpenLazyMemory]. After an error
// the caller removes what there is of dir.
func LayOutMapped(ctx context.Context, imageDir, dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("lay out memory to be mapped: %w", err)
	}
	var index indexOfMapped
	l, err := openLayout(imageDir)
	if err == nil {
		index.MappedMemory = l.MappedMemory
		err = errors.Join(l.write(ctx, dir), l.close())
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil { // of whatever kind: who looks for it is told, and does not try again
		index = indexOfMapped{Reason: strings.TrimSuffix(err.Error(), ": "+errdefs.ErrNotImplemented.Error())}
		if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
			return fmt.Errorf("lay out memory to be mapped: %w", err)
		}
	}
	data, err := json.Marshal(index)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, MappedIndex), data, 0o600)
}

// OpenMappedMemory reads what [LayOutMapped] has made. An error that matches
// [errdefs.ErrNotImplemented] says why nothing can be mapped.
func OpenMappedMemory(dir string) (*MappedMemory, error) {
	d, err := openImages(dir)
	if absent(err) {
		return nil, errNotLaidOut
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	f, _, err := openRegular(d.fd, MappedIndex, maxMappedIndex)
	if absent(err) {
		return nil, errNotLaidOut
	}
	if err != nil {
		return nil, fmt.Errorf("mapped memory: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxMappedIndex))
	if err != nil {
		return nil, fmt.Errorf("mapped memory: %w", err)
	}
	index := indexOfMapped{MappedMemory: MappedMemory{dir: dir}}
	if err := json.Unmarshal(data, &index); err != nil {
		return nil, d.corrupt(MappedIndex, "%v", err)
	}
	if index.Reason != "" {
		return nil, fmt.Errorf("%s: %w", printable([]byte(index.Reason)), errdefs.ErrNotImplemented)
	}
	m := &index.MappedMemory
	if err := m.check(d); err != nil {
		return nil, err
	}
	return m, nil
}

var errNotLaidOut = fmt.Errorf("it was made without images for that: %w", errdefs.ErrNotImplemented)

// check lists the images, and compares them and the keys with what there has to be. CRIU
// would look in the container for a file that it is not given.
func (m *MappedMemory) check(d *images) error {
	images := map[string]bool{filesImage: true}
	keys := map[string]bool{} // that are yet to be found
	for _, f := range m.Files {
		var id, pid uint32
		if n, _ := fmt.Sscanf(f.Name, "pages-%d.img", &id); n != 1 || f.Name != pagesName(id) || images[f.Name] {
			return d.corrupt(MappedIndex, "file %q", printable([]byte(f.Name)))
		}
		if len(f.Keys) != descriptors {
			return d.corrupt(MappedIndex, "%d keys for %s", len(f.Keys), f.Name)
		}
		fmt.Sscanf(f.Keys[0], mappedKey+"%d-", &pid)
		for i, key := range f.Keys {
			if key != keyOf(pid, i) || keys[key] {
				return d.corrupt(MappedIndex, "key %q", printable([]byte(key)))
			}
			keys[key] = true
		}
		images[f.Name], images[mmName(pid)], images[pagemapName(pid)] = true, true, true
	}
	if len(keys) == 0 {
		return d.corrupt(MappedIndex, "no files")
	}
	names, err := d.names("*")
	if err != nil {
		return err
	}
	for _, name := range names {
		if name == MappedIndex {
			continue
		}
		if !images[name] {
			return d.corrupt(MappedIndex, "%q is none of its files", printable([]byte(name)))
		}
		f, _, err := openRegular(d.fd, name, -1)
		if err != nil {
			return fmt.Errorf("image: %w", err)
		}
		f.Close()
		m.images = append(m.images, name)
	}
	if len(m.images) != len(images) {
		return d.corrupt(MappedIndex, "of %d images %d are there", len(images), len(m.images))
	}
	err = each(d, filesImage, magicFiles, new(fdinfo.FileEntry), func(e *fdinfo.FileEntry) error {
		if key, ok := strings.CutPrefix(e.GetReg().GetName(), "/"); ok && strings.HasPrefix(key, mappedKey) {
			if !keys[key] {
				return d.corrupt(filesImage, "file %q", printable([]byte(key)))
			}
			delete(keys, key)
		}
		return checkFile(e)
	})
	if err == nil && len(keys) > 0 {
		err = d.corrupt(filesImage, "%d files of memory are missing", len(keys))
	}
	return err
}

// Use changes dir, the view of the image directory that [LinkImages] made, into that of
// a restore with mapped memory: it links what was laid out, with the timers rearmed
// ([RearmTimers]). [SetMergeable], for processes of which nothing is mapped, must come
// before; with merge, memory that is not mapped is offered for merging.
//
// CRIU maps files for private mappings as it does for libraries (criu/files-reg.c:
// open_filemap, open_path), and takes one that it was given a descriptor for
// (criu/files.c: inherited_fd) wherever that lies.
func (m *MappedMemory) Use(dir string, merge bool) error {
	target, err := relative(dir, m.dir)
	if err != nil {
		return fmt.Errorf("link images: %w", err)
	}
	for _, name := range m.images {
		link := filepath.Join(dir, name)
		if err := errors.Join(os.Remove(link), os.Symlink(filepath.Join(target, name), link)); err != nil {
			return fmt.Errorf("link images: %w", err)
		}
	}
	if merge {
		return SetMergeable(m.dir, dir, true)
	}
	return nil
}

// mappedLayout is what [LayOutMapped] writes.
type mappedLayout struct {
	MappedMemory
	images *images
	tasks  []mappedTask
}

// openLayout reads from the images what can be mapped. An error that matches
// [errdefs.ErrNotImplemented] says why nothing can be, though the images are whole.
func openLayout(imageDir string) (_ *mappedLayout, err error) {
	d, err := openImages(imageDir)
	if err != nil {
		return nil, err
	}
	m := &mappedLayout{images: d}
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	tasks, err := d.tasks()
	if err != nil {
		return nil, err
	}
	files, err := d.files()
	if err != nil {
		return nil, err
	}
	next := uint32(0)
	for _, id := range files.order {
		next = max(next, id)
		if strings.HasPrefix(path.Base(files.byID[id].path), mappedKey) {
			return nil, fmt.Errorf("a file is called %s: %w", printable([]byte(files.byID[id].path)), errdefs.ErrNotImplemented)
		}
	}
	var why error // of the first process
	left := uint64(0)
	for _, task := range tasks {
		if task.zombie() {
			continue
		}
		t := mappedTask{pid: task.pid, mm: new(mm.MmEntry)}
		if err := d.one(t.mm, mmName(t.pid), magicCommon, magicMM); err != nil {
			return nil, err
		}
		reason := mustNotMap(t.mm, files)
		if reason == nil {
			if next > math.MaxInt32-descriptors {
				return nil, d.corrupt(filesImage, "file id %d", next)
			}
			t.fileID = next + 1
			next += descriptors
			if err := d.mappedTask(&t); err != nil {
				return nil, err
			}
			if len(t.runs) == 0 {
				reason = errors.New("it has no memory for that")
			}
		}
		if reason != nil {
			if why == nil {
				why = fmt.Errorf("process %d: %w", t.pid, reason)
			}
			continue
		}
		m.tasks = append(m.tasks, t)
		m.Files = append(m.Files, MappedFile{pagesName(t.pagesID), t.keys()})
		m.Segments += len(t.runs)
		for _, r := range t.runs {
			m.Bytes += r.size
		}
		if left += t.left; left > maxLeft {
			return nil, fmt.Errorf("more than %d MiB cannot be mapped (locked, huge pages, or in small pieces): %w", maxLeft>>20, errdefs.ErrNotImplemented)
		}
	}
	if len(m.tasks) == 0 {
		if why == nil {
			why = errors.New("it has no process")
		}
		return nil, fmt.Errorf("%w: %w", why, errdefs.ErrNotImplemented)
	}
	return m, nil
}

// mappedTask finds the runs that are worth a mapping, and opens their pages.
func (d *images) mappedTask(t *mappedTask) error {
	vmas, err := d.lazyVMAs(mmName(t.pid), t.mm.GetVmas())
	if err != nil {
		return err
	}
	name := pagemapName(t.pid)
	id, size, err := d.presentRuns(name, func(r run, off uint64) error {
		for addr, end := r.addr, r.addr+r.pages*PageSize; addr < end; {
			for len(vmas) > 0 && vmas[0].GetEnd() <= addr {
				vmas = vmas[1:]
			}
			if len(vmas) == 0 || vmas[0].GetStart() > addr {
				return d.corrupt(name, "pages at %#x, where nothing is mapped", addr)
			}
			v := vmas[0]
			part := mappedRun{addr: addr, size: min(end, v.GetEnd()) - addr, off: off + addr - r.addr}
			mapped := canBeMapped(v)
			if mapped && mayHaveBlocks(v) {
				part.size = min(part.size, mremapEvery-addr%mremapEvery)
				part.descriptor = uint32(addr / mremapEvery % descriptors)
			}
			switch last := len(t.runs) - 1; {
			case mapped && last >= 0 && addr > v.GetStart() && t.runs[last].goesOn(part):
				t.runs[last].size += part.size // a run of CRIU's is no larger than a pipe of its dump
			case mapped && part.size >= minMapped:
				t.runs = append(t.runs, part)
			default:
				t.left += part.size
			}
			addr += part.size
		}
		return nil
	})
	if absent(err) || err == nil && len(t.runs) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	if t.left == 0 {
		// CRIU expects a page at least; a stack has one.
		return fmt.Errorf("process %d: all of its memory would be mapped: %w", t.pid, errdefs.ErrNotImplemented)
	}
	if n := len(t.mm.GetVmas()) + 2*len(t.runs); n > maxMappedVMAs {
		return fmt.Errorf("process %d: %d mappings are too many: %w", t.pid, n, errdefs.ErrNotImplemented)
	}
	t.pagesID = id
	t.pages, _, err = d.openPages(id, name, size)
	return err
}

// descriptors is from how many a file is mapped.
const descriptors = 2

// keyOf is the name by which CRIU is given a descriptor for the memory of a process.
func keyOf(pid uint32, i int) string { return fmt.Sprintf("%s%d-%d", mappedKey, pid, i) }

func (t *mappedTask) keys() (keys []string) {
	for i := range descriptors {
		keys = append(keys, keyOf(t.pid, i))
	}
	return keys
}

func (m *mappedLayout) close() error {
	errs := []error{m.images.Close()}
	for _, t := range m.tasks {
		errs = append(errs, t.pages.Close())
	}
	return errors.Join(errs...)
}

// mustNotMap tells why a process's memory must not be mapped, as far as the names of
// what it has mapped say so, see [MappedMemory].
func mustNotMap(e *mm.MmEntry, files *fileTable) error {
	if len(e.GetVmas()) > maxMappings {
		return fmt.Errorf("%d mappings", len(e.GetVmas()))
	}
	jvm := false
	for _, v := range e.GetVmas() {
		if v.GetStatus()&vmaFilePrivate == 0 || v.GetShmid() > math.MaxUint32 {
			continue
		}
		f := files.byID[uint32(v.GetShmid())]
		if f == nil {
			continue
		}
		base := path.Base(f.path)
		jvm = jvm || base == "libjvm.so"
		for _, other := range []string{"jemalloc", "tcmalloc", "mimalloc", "hoard", "snmalloc", "scudo", "libj9"} {
			if strings.Contains(base, other) {
				return fmt.Errorf("it uses %s, which may rely on MADV_DONTNEED", printable([]byte(base)))
			}
		}
	}
	if !jvm {
		return errors.New("it is no Java virtual machine (no libjvm.so)")
	}
	return nil
}

// canBeMapped tells whether runs of a mapping may be mapped: those of private memory,
// and what was written to of private files, as the virtual machine does to its archive
// of classes. Left out are stacks, which grow, and what a file cannot have.
func canBeMapped(v *vma.VmaEntry) bool {
	if v.GetFlags()&(unix.MAP_GROWSDOWN|mapDroppable|unix.MAP_LOCKED|unix.MAP_HUGETLB) != 0 || v.GetMadv()&(1<<unix.MADV_WIPEONFORK) != 0 {
		return false
	}
	const regular = 1 << 0
	switch v.GetStatus() {
	case regular | vmaFilePrivate:
		return true
	case regular | vmaAnonPrivate, regular | vmaAnonPrivate | vmaHeap:
		return canBeLazy(v)
	}
	return false
}

// mayHaveBlocks tells whether malloc may have put blocks into a mapping that are
// mappings of their own, one or several next to each other, which the kernel joins.
// They are not what brk gives, nor what can be executed, nor memory that nothing is
// reserved for (MAP_NORESERVE: malloc's arenas, and what the virtual machine keeps for
// later). Nor are they in the first terabyte, where the virtual machine puts its heap
// and classes: mmap begins at the upper end of the address space, or at its third.
func mayHaveBlocks(v *vma.VmaEntry) bool {
	const firstTerabyte = 1 << 40
	return v.GetStatus()&(vmaHeap|vmaFilePrivate) == 0 && v.GetProt()&unix.PROT_EXEC == 0 &&
		v.GetFlags()&unix.MAP_NORESERVE == 0 && v.GetEnd() > firstTerabyte
}

// write writes the images: the mappings and files with those that are mapped, and the
// few pages that are left for CRIU to read. What [RearmTimers] does, and [SetMergeable]
// for memory that is not offered, is done here, too.
func (m *mappedLayout) write(ctx context.Context, dir string) error {
	to, err := openImages(dir)
	if err != nil {
		return err
	}
	defer to.Close()
	var entries []proto.Message
	err = each(m.images, filesImage, magicFiles, new(fdinfo.FileEntry), func(e *fdinfo.FileEntry) error {
		rearm(e)
		entries = append(entries, proto.CloneOf(e))
		return nil
	})
	if err != nil {
		return err
	}
	for i := range m.tasks {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		t := &m.tasks[i]
		for i, key := range t.keys() {
			id := t.fileID + uint32(i)
			entries = append(entries, &fdinfo.FileEntry{
				Type: fdinfo.FdTypes_REG.Enum(), Id: &id,
				Reg: &regfile.RegFileEntry{
					Id: &id, Flags: proto.Uint32(unix.O_RDONLY), Pos: proto.Uint64(0), Name: proto.String("/" + key),
					Fown: &fown.FownEntry{Uid: proto.Uint32(0), Euid: proto.Uint32(0), Signum: proto.Uint32(0), PidType: proto.Uint32(0), Pid: proto.Uint32(0)},
				},
			})
		}
		if err := t.write(m.images, to); err != nil {
			return err
		}
	}
	return to.replace(filesImage, magicFiles, entries...)
}

func (t *mappedTask) write(d, to *images) error {
	e := proto.CloneOf(t.mm)
	e.Vmas = t.split()
	for _, v := range e.Vmas {
		offer(v, false)
	}
	if err := to.replace(mmName(t.pid), magicMM, e); err != nil {
		return err
	}
	return t.writePages(d, to)
}

// split makes mappings of the file of pages where there are runs. What lies between
// them is as before: anonymous memory, which reads as zeroes, or a file.
func (t *mappedTask) split() []*vma.VmaEntry {
	out := make([]*vma.VmaEntry, 0, len(t.mm.GetVmas())+2*len(t.runs))
	runs := t.runs
	for _, v := range t.mm.GetVmas() {
		part := func(start, end uint64) *vma.VmaEntry {
			p := proto.CloneOf(v)
			if isFile(v) {
				p.Pgoff = proto.Uint64(v.GetPgoff() + start - v.GetStart())
			}
			p.Start, p.End = &start, &end
			out = append(out, p)
			return p
		}
		if v.GetStatus()&vmaGuard != 0 { // they come last, and lie within others
			out = append(out, v)
			continue
		}
		at := v.GetStart()
		for len(runs) > 0 && runs[0].addr < v.GetEnd() {
			r := runs[0]
			runs = runs[1:]
			if at < r.addr {
				part(at, r.addr)
			}
			at = r.end()
			p := part(r.addr, at)
			p.Pgoff = proto.Uint64(r.off)
			p.Shmid = proto.Uint64(uint64(t.fileID + r.descriptor))
			p.Flags = proto.Uint32(v.GetFlags() &^ unix.MAP_ANONYMOUS)
			p.Status = proto.Uint32(v.GetStatus()&^(vmaAnonPrivate) | vmaFilePrivate)
			p.Fdflags = proto.Uint32(unix.O_RDONLY)
		}
		if at < v.GetEnd() {
			part(at, v.GetEnd())
		}
	}
	return out
}

// writePages writes the pagemap and the pages of what is not mapped.
func (t *mappedTask) writePages(d, to *images) (err error) {
	pages := pagesName(t.pagesID)
	fd, err := unix.Openat(to.fd, pages, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: pages, Err: err}
	}
	out := os.NewFile(uintptr(fd), pages)
	defer func() { err = errors.Join(err, out.Close()) }()
	name := pagemapName(t.pid)
	entries := []proto.Message{&pagemap.PagemapHead{PagesId: &t.pagesID}}
	buf := make([]byte, 256<<10)
	add := func(addr, size uint64, flags uint32, off uint64) error {
		entries = append(entries, pagemapEntry(addr, size/PageSize, flags))
		if flags&pagePresent == 0 {
			return nil
		}
		n, err := io.CopyBuffer(out, onlyReader{io.NewSectionReader(t.pages, int64(off), int64(size))}, buf)
		if err == nil && uint64(n) != size {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	runs, off := t.runs, uint64(0)
	_, err = d.pagemap(name, func(r run) error {
		size := r.pages * PageSize
		for addr, end := r.addr, r.addr+size; addr < end; {
			for len(runs) > 0 && runs[0].end() <= addr {
				runs = runs[1:]
			}
			next := end // of what is left here, or of what is mapped
			switch {
			case len(runs) == 0 || runs[0].addr >= end:
			case runs[0].addr > addr:
				next = runs[0].addr
			default:
				addr = runs[0].end()
				continue
			}
			if err := add(addr, next-addr, r.flags, off+addr-r.addr); err != nil {
				return err
			}
			addr = next
		}
		if r.flags&pagePresent != 0 {
			off += size
		}
		return nil
	})
	if err != nil {
		return err
	}
	return to.replace(name, magicPagemap, entries...)
}

// onlyReader hides what else a reader can do, so that the buffer is used.
type onlyReader struct{ io.Reader }

// pagemapEntry is an entry as CRIU 4.2 writes it, see [image.pagemap].
func pagemapEntry(addr, pages uint64, flags uint32) *pagemap.PagemapEntry {
	e := &pagemap.PagemapEntry{Vaddr: &addr, NrPages: proto.Uint32(0), Flags: &flags}
	if pages <= math.MaxUint32 {
		e.NrPages = proto.Uint32(uint32(pages)) // for one before it
	}
	e.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 5, protowire.VarintType), pages))
	return e
}
