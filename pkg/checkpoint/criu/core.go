package criu

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sort"

	corex86 "github.com/checkpoint-restore/go-criu/v7/crit/images/core-x86"
	core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/memfd"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	remap "github.com/checkpoint-restore/go-criu/v7/crit/images/remap-file-path"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const magicMemfd = 0x48453499

// Bounds on a core file.
const (
	maxPieces    = 1 << 21  // runs of pages
	maxSegments  = 1 << 20  // program headers
	maxCoreNotes = 64 << 20 // bytes
	maxAuxv      = 512      // words
	// maxCopies bounds how often, on average, a page of the images may be in
	// the core file: shared memory is there once for each mapping of it.
	maxCopies = 16
	// maxHole is the gap in anonymous memory above which it becomes a segment of
	// its own, without a place in the file. Smaller ones are holes in the file,
	// which keeps the number of segments low; the reservations of gigabytes that
	// runtimes make would exceed what a file system accepts as a file's size.
	maxHole = 1 << 20
)

// WriteCore writes the ELF core file of one process of an image directory, as
// the kernel would have written it at the moment of the dump, but for the
// signal, which is 0. The process is named by its id in the container. w is an
// empty file: what is not written must read as zeroes, so that absent pages
// become holes.
//
// In it are the general and floating-point registers of all threads (on x86
// without the upper halves of AVX registers and what came later), the name,
// arguments, auxiliary vector and mapped files of the process, and all of its
// memory that is in the images: private memory, shared anonymous memory and
// memfds that are mapped shared. Pages of mapped files that the process did not change are left to
// the files, which debuggers look for by their names in the container. System V
// shared memory, rings of asynchronous I/O and the kernel's own pages are
// mapped without content.
//
// Images of architectures other than x86_64 and aarch64, of 32-bit programs and
// of incremental dumps are refused with [errdefs.ErrNotImplemented]; a process
// that is not there with [errdefs.ErrNotFound]; a zombie, which has no memory,
// with [errdefs.ErrFailedPrecondition]; what does not parse with
// [checkpoint.ErrCorrupt]. After an error the content of w is undefined.
func WriteCore(ctx context.Context, imageDir string, pid uint32, w io.WriterAt) error {
	d, err := openImages(imageDir)
	if err != nil {
		return err
	}
	defer d.Close()
	tasks, err := d.tasks()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(tasks, func(t *task) bool { return t.pid == pid })
	switch {
	case i < 0:
		return fmt.Errorf("process %d is not in the images: %w", pid, errdefs.ErrNotFound)
	case tasks[i].zombie():
		return fmt.Errorf("%s is a zombie and has no memory: %w", tasks[i], errdefs.ErrFailedPrecondition)
	}
	c := &coreFile{d: d, t: tasks[i], sources: map[string]*source{}}
	defer c.Close()
	if err := c.collect(ctx); err != nil {
		return err
	}
	return c.write(ctx, w)
}

// coreFile is a core file in the making.
type coreFile struct {
	d        *images
	t        *task
	mm       mm.MmEntry
	machine  elf.Machine
	sources  map[string]*source // by name of their pagemap; nil for one that is not there
	pieces   []piece            // by address
	segments []segment          // by address
	notes    []byte
	mapped   []mappedFile
}

// mappedFile is a mapping of a file, for NT_FILE.
type mappedFile struct {
	start, end, offset uint64
	name               string
}

// source is a pagemap and the pages that it describes.
type source struct {
	f    *os.File
	runs []piece // src is nil; addresses are those of the pagemap
}

// piece is memory whose content is in the images.
type piece struct {
	addr, size uint64
	src        *source
	off        int64 // in the file of pages
}

func (p piece) end() uint64 { return p.addr + p.size }

// segment is one PT_LOAD. Its pieces lie in its first filesz bytes.
type segment struct {
	addr, memsz, filesz uint64
	flags               elf.ProgFlag
	pieces              []piece
}

func (c *coreFile) Close() {
	for _, s := range c.sources {
		if s != nil {
			s.f.Close()
		}
	}
}

// collect reads all but the pages.
func (c *coreFile) collect(ctx context.Context) error {
	name := mmName(c.t.pid)
	if err := c.d.one(&c.mm, name, magicCommon, magicMM); err != nil {
		return err
	}
	vmas := c.mm.GetVmas()
	if len(vmas) > maxMappings || len(c.mm.GetMmSavedAuxv()) > maxAuxv {
		return c.d.corrupt(name, "%d mappings, auxiliary vector of %d words", len(vmas), len(c.mm.GetMmSavedAuxv()))
	}
	files, err := c.files(vmas)
	if err != nil {
		return err
	}
	total, err := c.d.memory()
	if err != nil {
		return err
	}
	left, end := maxCopies*uint64(total), uint64(0)
	for _, v := range vmas {
		if v.GetStatus()&(vmaGuard|vmaVsyscall) != 0 {
			continue // within another mapping; above user space
		}
		if v.GetStart() >= v.GetEnd() || v.GetStart() < end || v.GetEnd() > maxAddress || (v.GetStart()|v.GetEnd())%PageSize != 0 {
			return c.d.corrupt(name, "mapping %#x-%#x", v.GetStart(), v.GetEnd())
		}
		end = v.GetEnd()
		if err := ctx.Err(); err != nil {
			return err
		}
		file := files[v.GetShmid()]
		pieces, err := c.content(v, file)
		if err != nil {
			return err
		}
		for _, p := range pieces {
			if p.size > left {
				return c.d.corrupt(name, "memory of more than %d times the pages in the images", maxCopies)
			}
			left -= p.size
		}
		if c.pieces = append(c.pieces, pieces...); len(c.pieces) > maxPieces {
			return c.d.corrupt(name, "more than %d runs of pages", maxPieces)
		}
		c.addSegments(v, pieces)
		if len(c.segments) > maxSegments {
			return c.d.corrupt(name, "more than %d segments", maxSegments)
		}
		if isFile(v) && file != nil && file.name != "" {
			c.mapped = append(c.mapped, mappedFile{start: v.GetStart(), end: v.GetEnd(), offset: v.GetPgoff(), name: file.name})
		}
	}
	return c.collectNotes()
}

func isFile(v *vma.VmaEntry) bool { return v.GetStatus()&(vmaFilePrivate|vmaFileShared) != 0 }

func isSharedMemfd(v *vma.VmaEntry) bool {
	return v.GetStatus()&vmaMemfd != 0 && v.GetFlags()&unix.MAP_SHARED != 0
}

// namedFile is what the id of a mapped file stands for.
type namedFile struct {
	name  string
	shmem uint32 // the memfd's shared memory; 0 for other files
}

// files finds the files that mappings name by their ids.
func (c *coreFile) files(vmas []*vma.VmaEntry) (map[uint64]*namedFile, error) {
	files := map[uint64]*namedFile{}
	for _, v := range vmas {
		if isFile(v) {
			files[v.GetShmid()] = new(namedFile)
		}
	}
	const name = "files.img"
	inodes := map[uint32][]*namedFile{} // of memfds
	err := each(c.d, name, magicFiles, new(fdinfo.FileEntry), func(e *fdinfo.FileEntry) error {
		m := files[uint64(e.GetId())]
		if m == nil {
			return nil
		}
		switch {
		case e.Reg != nil:
			m.name = e.Reg.GetName()
		case e.Memfd != nil:
			inodes[e.Memfd.GetInodeId()] = append(inodes[e.Memfd.GetInodeId()], m)
		}
		if len(m.name) > unix.PathMax || bytes.IndexByte([]byte(m.name), 0) >= 0 {
			return c.d.corrupt(name, "name of file %d", e.GetId())
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = each(c.d, "remap-fpath.img", magicRemap, new(remap.RemapFilePathEntry), func(e *remap.RemapFilePathEntry) error {
		const gone = " (deleted)" // as the kernel says
		if m := files[uint64(e.GetOrigId())]; m != nil && m.name != "" && len(m.name) <= unix.PathMax && e.GetRemapType() != remap.RemapType_PROCFS {
			m.name += gone
		}
		return nil
	})
	if err != nil && !absent(err) {
		return nil, err
	}
	if len(inodes) == 0 {
		return files, nil
	}
	return files, each(c.d, "memfd.img", magicMemfd, new(memfd.MemfdInodeEntry), func(e *memfd.MemfdInodeEntry) error {
		for _, m := range inodes[uint32(e.GetInodeId())] {
			m.shmem = e.GetShmid()
		}
		return nil
	})
}

// content is what the images hold of a mapping.
func (c *coreFile) content(v *vma.VmaEntry, file *namedFile) ([]piece, error) {
	var shmem uint64
	switch {
	case v.GetStatus()&vmaSysV != 0:
		return nil, nil
	case v.GetStatus()&vmaAnonShared != 0:
		shmem = v.GetShmid()
	case isSharedMemfd(v):
		if file == nil || file.shmem == 0 {
			return nil, c.d.corrupt("memfd.img", "nothing about file %d, mapped at %#x", v.GetShmid(), v.GetStart())
		}
		shmem = uint64(file.shmem)
	default:
		src, err := c.source(pagemapName(c.t.pid))
		if src == nil {
			return nil, err
		}
		return src.slice(v.GetStart(), v.GetEnd(), v.GetStart()), nil
	}
	from, size := v.GetPgoff(), v.GetEnd()-v.GetStart()
	if from%PageSize != 0 || from > maxAddress-size {
		return nil, c.d.corrupt(mmName(c.t.pid), "mapping at %#x: offset %#x", v.GetStart(), from)
	}
	// Content of files that are mapped shared is not in the images, but CRIU
	// keeps shared memory, which has no other place, in pages that are counted
	// from the beginning of the memory object.
	src, err := c.source(fmt.Sprintf("pagemap-shmem-%d.img", shmem))
	if src == nil {
		return nil, err
	}
	return src.slice(from, from+size, v.GetStart()), nil
}

// source reads a pagemap, once; nil if it is not there.
func (c *coreFile) source(name string) (*source, error) {
	if s, ok := c.sources[name]; ok {
		return s, nil
	}
	s := new(source)
	size := uint64(0)
	id, err := c.d.pagemap(name, func(r run) error {
		switch {
		case r.flags&pagePresent != 0:
		case r.flags&(pageParent|pageLazy) != 0:
			return fmt.Errorf("image %s: pages at %#x are in other images, of an incremental or lazy dump: %w", name, r.addr, errdefs.ErrNotImplemented)
		default:
			return nil
		}
		n := r.pages * PageSize
		if len(s.runs) >= maxPieces || size > maxAddress-n {
			return c.d.corrupt(name, "more than %d runs or %#x bytes", maxPieces, uint64(maxAddress))
		}
		s.runs = append(s.runs, piece{addr: r.addr, size: n, off: int64(size)})
		size += n
		return nil
	})
	if absent(err) {
		c.sources[name] = nil
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	pages := fmt.Sprintf("pages-%d.img", id)
	f, have, err := openRegular(c.d.fd, pages, -1)
	switch {
	case absent(err) && size == 0:
		c.sources[name] = nil
		return nil, nil
	case absent(err):
		return nil, c.d.corrupt(pages, "absent; %s has %d bytes in it", name, size)
	case err != nil:
		return nil, fmt.Errorf("image: %w", err)
	case uint64(have) < size:
		f.Close()
		return nil, c.d.corrupt(pages, "%d bytes, %s has %d in it", have, name, size)
	}
	s.f = f
	c.sources[name] = s
	return s, nil
}

// slice cuts out what lies in [from, to), moved so that from becomes addr.
func (s *source) slice(from, to, addr uint64) []piece {
	i := sort.Search(len(s.runs), func(i int) bool { return s.runs[i].end() > from })
	var out []piece
	for ; i < len(s.runs) && s.runs[i].addr < to; i++ {
		r := s.runs[i]
		start, end := max(r.addr, from), min(r.end(), to)
		out = append(out, piece{addr: addr + (start - from), size: end - start, src: s, off: r.off + int64(start-r.addr)})
	}
	return out
}

// addSegments makes the segments of a mapping. Absent pages of a file must not
// read as zeroes: they get segments without content, for which debuggers turn
// to the file.
func (c *coreFile) addSegments(v *vma.VmaEntry, pieces []piece) {
	limit := uint64(maxHole)
	if isFile(v) && !isSharedMemfd(v) {
		limit = 1
	}
	var flags elf.ProgFlag
	for _, f := range []struct {
		prot uint32
		flag elf.ProgFlag
	}{{unix.PROT_READ, elf.PF_R}, {unix.PROT_WRITE, elf.PF_W}, {unix.PROT_EXEC, elf.PF_X}} {
		if v.GetProt()&f.prot != 0 {
			flags |= f.flag
		}
	}
	seg := segment{addr: v.GetStart(), flags: flags}
	cut := func(at uint64) { // ends seg there and begins another
		if at > seg.addr {
			seg.memsz = at - seg.addr
			c.segments = append(c.segments, seg)
		}
		seg = segment{addr: at, flags: flags}
	}
	gap := func(to uint64) { // nothing until there
		if at := seg.addr + seg.filesz; to-at >= limit {
			cut(at)
			cut(to)
		}
	}
	for i, p := range pieces {
		gap(p.addr)
		seg.pieces = pieces[i-len(seg.pieces) : i+1]
		seg.filesz = p.end() - seg.addr
	}
	gap(v.GetEnd())
	cut(v.GetEnd())
}

// Types of notes, include/uapi/linux/elf.h.
const (
	noteStatus = 1 // NT_PRSTATUS
	noteFPRegs = 2 // NT_PRFPREG
	noteInfo   = 3 // NT_PRPSINFO
	noteAuxv   = 6
	noteFile   = 0x46494c45
	noteARMTLS = 0x401
)

func (c *coreFile) note(owner string, typ uint32, desc []byte) {
	le := binary.LittleEndian
	c.notes = le.AppendUint32(c.notes, uint32(len(owner)+1))
	c.notes = le.AppendUint32(c.notes, uint32(len(desc)))
	c.notes = le.AppendUint32(c.notes, typ)
	c.notes = padded(append(c.notes, owner+"\x00"...), 4)
	c.notes = padded(append(c.notes, desc...), 4)
}

// padded appends zeroes up to a multiple of n.
func padded(b []byte, n int) []byte { return append(b, make([]byte, -len(b)&(n-1))...) }

// collectNotes makes the notes: those of the first thread around those of the
// process, then those of the other threads, as the kernel orders them. What
// follows a thread's status is taken for that thread's.
func (c *coreFile) collectNotes() error {
	for i, tid := range c.t.threads {
		e := c.t.core
		if i > 0 {
			var err error
			if e, err = c.d.core(tid); err != nil {
				return err
			}
		}
		r, err := c.registers(tid, e)
		if err != nil {
			return err
		}
		if i == 0 {
			c.machine = r.machine
		} else if c.machine != r.machine {
			return c.d.corrupt(coreName(tid), "of %s, the first thread of %s", r.machine, c.machine)
		}
		c.note("CORE", noteStatus, c.status(tid, e, r))
		if i == 0 {
			c.note("CORE", noteInfo, c.info())
			c.note("CORE", noteAuxv, words(c.mm.GetMmSavedAuxv()...))
			files, err := c.fileNote()
			if err != nil {
				return err
			}
			c.note("CORE", noteFile, files)
		}
		if r.float != nil {
			c.note("CORE", noteFPRegs, r.float)
		}
		if r.tls != nil {
			c.note("LINUX", noteARMTLS, r.tls)
		}
		if len(c.notes) > maxCoreNotes {
			return c.d.corrupt(coreName(tid), "notes of more than %d bytes", maxCoreNotes)
		}
	}
	return nil
}

func words(v ...uint64) []byte {
	b := make([]byte, 0, 8*len(v))
	for _, w := range v {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	return b
}

func halfWords(b []byte, v ...uint32) []byte {
	for _, w := range v {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	return b
}

// registers are those of a thread, in the kernel's layout.
type registers struct {
	machine elf.Machine
	general []byte // struct user_regs_struct, user_pt_regs
	float   []byte // struct user_fpregs_struct, user_fpsimd_state; nil without
	tls     []byte // of aarch64, where it is not among the general registers
}

func (c *coreFile) registers(tid uint32, e *core.CoreEntry) (registers, error) {
	bad := func(what string) (registers, error) { return registers{}, c.d.corrupt(coreName(tid), "%s", what) }
	le := binary.LittleEndian
	switch arch := e.GetMtype(); arch {
	case core.CoreEntry_X86_64:
		g := e.GetThreadInfo().GetGpregs()
		if g == nil {
			return bad("no registers")
		}
		if g.GetMode() != corex86.UserX86RegsMode_NATIVE {
			return registers{}, fmt.Errorf("image %s: a 32-bit program: %w", coreName(tid), errdefs.ErrNotImplemented)
		}
		r := registers{machine: elf.EM_X86_64, general: words(
			g.GetR15(), g.GetR14(), g.GetR13(), g.GetR12(), g.GetBp(), g.GetBx(), g.GetR11(), g.GetR10(), g.GetR9(), g.GetR8(),
			g.GetAx(), g.GetCx(), g.GetDx(), g.GetSi(), g.GetDi(), g.GetOrigAx(), g.GetIp(), g.GetCs(), g.GetFlags(),
			g.GetSp(), g.GetSs(), g.GetFsBase(), g.GetGsBase(), g.GetDs(), g.GetEs(), g.GetFs(), g.GetGs())}
		if f := e.GetThreadInfo().GetFpregs(); f != nil {
			if len(f.GetStSpace()) != 32 || len(f.GetXmmSpace()) != 64 {
				return bad("floating-point registers")
			}
			for _, v := range []uint32{f.GetCwd(), f.GetSwd(), f.GetTwd(), f.GetFop()} {
				r.float = le.AppendUint16(r.float, uint16(v))
			}
			r.float = append(r.float, words(f.GetRip(), f.GetRdp())...)
			r.float = halfWords(r.float, f.GetMxcsr(), f.GetMxcsrMask())
			r.float = halfWords(halfWords(r.float, f.GetStSpace()...), f.GetXmmSpace()...)
			r.float = padded(r.float, 512)
		}
		return r, nil
	case core.CoreEntry_AARCH64:
		t := e.GetTiAarch64()
		g := t.GetGpregs()
		if len(g.GetRegs()) != 31 {
			return bad("registers")
		}
		r := registers{machine: elf.EM_AARCH64, tls: words(t.GetTls())}
		r.general = words(append(slices.Clone(g.GetRegs()), g.GetSp(), g.GetPc(), g.GetPstate())...)
		if f := t.GetFpsimd(); f != nil {
			if len(f.GetVregs()) != 64 {
				return bad("floating-point registers")
			}
			r.float = halfWords(words(f.GetVregs()...), f.GetFpsr(), f.GetFpcr(), 0, 0)
		}
		return r, nil
	default:
		return registers{}, fmt.Errorf("image %s: of architecture %v; core files can be made of x86_64 and aarch64: %w", coreName(tid), arch, errdefs.ErrNotImplemented)
	}
}

// status is struct elf_prstatus of a thread.
func (c *coreFile) status(tid uint32, e *core.CoreEntry, r registers) []byte {
	masked := e.GetThreadCore().GetBlkSigset()
	if e.GetTc() != nil { // the first thread's is there
		masked = e.GetTc().GetBlkSigset()
	}
	var floats uint32
	if r.float != nil {
		floats = 1
	}
	b := make([]byte, 16, 512) // no signal
	b = append(b, words(0, masked)...)
	b = halfWords(b, tid, c.t.ppid, c.t.pgid, c.t.sid)
	b = append(b, make([]byte, 4*16)...) // times
	b = append(b, r.general...)
	return padded(halfWords(b, floats), 8)
}

// info is struct elf_prpsinfo of the process.
func (c *coreFile) info() []byte {
	tc, thread := c.t.core.GetTc(), c.t.core.GetThreadCore()
	b := []byte{0, 'R', 0, byte(thread.GetSchedNice()), 0, 0, 0, 0}
	if tc.GetTaskState() == taskStopped {
		b[0], b[1] = 3, 'T'
	}
	b = append(b, words(uint64(tc.GetFlags()))...)
	b = halfWords(b, thread.GetCreds().GetUid(), thread.GetCreds().GetGid(), c.t.pid, c.t.ppid, c.t.pgid, c.t.sid)
	text := func(s []byte, size int) {
		b = append(b, make([]byte, size)...)
		copy(b[len(b)-size:len(b)-1], s)
	}
	text([]byte(tc.GetComm()), 16)
	const size = 80
	var args []byte
	if start, end := c.mm.GetMmArgStart(), c.mm.GetMmArgEnd(); start < end {
		args = c.read(start, min(end-start, size-1))
	}
	text(bytes.TrimRight(bytes.ReplaceAll(args, []byte{0}, []byte{' '}), " "), size)
	return b
}

// read reads memory as far as it is there.
func (c *coreFile) read(addr, size uint64) []byte {
	var out []byte
	i := sort.Search(len(c.pieces), func(i int) bool { return c.pieces[i].end() > addr })
	for ; i < len(c.pieces) && size > 0 && c.pieces[i].addr <= addr; i++ {
		p := c.pieces[i]
		b := make([]byte, min(size, p.end()-addr))
		if _, err := p.src.f.ReadAt(b, p.off+int64(addr-p.addr)); err != nil {
			break // the copy will tell
		}
		out, addr, size = append(out, b...), addr+uint64(len(b)), size-uint64(len(b))
	}
	return out
}

// fileNote is NT_FILE: number, page size, then of each mapping start, end and
// offset in pages, then the names.
func (c *coreFile) fileNote() ([]byte, error) {
	b := words(uint64(len(c.mapped)), PageSize)
	for _, m := range c.mapped {
		b = append(b, words(m.start, m.end, m.offset/PageSize)...)
	}
	for _, m := range c.mapped {
		if b = append(b, m.name+"\x00"...); len(b) > maxCoreNotes {
			return nil, c.d.corrupt("files.img", "names of mapped files of more than %d bytes", maxCoreNotes)
		}
	}
	return b, nil
}

const (
	headerSize  = 64
	programSize = 56
	sectionSize = 64
)

// write writes the file: header, program headers, notes, where there are too
// many segments for the header the section that says so, and the memory.
func (c *coreFile) write(ctx context.Context, w io.WriterAt) error {
	const tooMany = 0xffff // PN_XNUM
	le := binary.LittleEndian
	count := 1 + len(c.segments)
	notesAt := uint64(headerSize + programSize*count)
	head := elf.Header64{
		Type: uint16(elf.ET_CORE), Machine: uint16(c.machine), Version: uint32(elf.EV_CURRENT),
		Phoff: headerSize, Ehsize: headerSize, Phentsize: programSize, Phnum: uint16(min(count, tooMany)), Shentsize: sectionSize,
	}
	copy(head.Ident[:], elf.ELFMAG)
	head.Ident[elf.EI_CLASS], head.Ident[elf.EI_DATA], head.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	var tail bytes.Buffer
	tail.Write(padded(c.notes, 8))
	if count >= tooMany {
		head.Shoff, head.Shnum = notesAt+uint64(tail.Len()), 1
		if err := binary.Write(&tail, le, elf.Section64{Info: uint32(count)}); err != nil {
			return err
		}
	}
	var b bytes.Buffer
	put := func(v any) error { return binary.Write(&b, le, v) }
	err := errors.Join(put(head), put(elf.Prog64{Type: uint32(elf.PT_NOTE), Off: notesAt, Filesz: uint64(len(c.notes)), Align: 4}))
	at := (notesAt + uint64(tail.Len()) + PageSize - 1) / PageSize * PageSize
	offsets := make([]int64, len(c.segments))
	for i, s := range c.segments {
		offsets[i] = int64(at)
		err = errors.Join(err, put(elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(s.flags), Off: at, Vaddr: s.addr, Filesz: s.filesz, Memsz: s.memsz, Align: PageSize}))
		at += s.filesz
	}
	if err != nil {
		return err
	}
	b.Write(tail.Bytes())
	if _, err := w.WriteAt(b.Bytes(), 0); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for i, s := range c.segments {
		for _, p := range s.pieces {
			if err := p.copyTo(ctx, w, offsets[i]+int64(p.addr-s.addr), buf); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p piece) copyTo(ctx context.Context, w io.WriterAt, at int64, buf []byte) error {
	for done := uint64(0); done < p.size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := buf[:min(uint64(len(buf)), p.size-done)]
		if _, err := p.src.f.ReadAt(b, p.off+int64(done)); err != nil {
			return fmt.Errorf("image: %w", err)
		}
		if _, err := w.WriteAt(b, at+int64(done)); err != nil {
			return err
		}
		done += uint64(len(b))
	}
	return nil
}
