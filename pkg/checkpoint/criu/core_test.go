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
	"path/filepath"
	"testing"

	aarch64 "github.com/checkpoint-restore/go-criu/v7/crit/images/core-aarch64"
	corex86 "github.com/checkpoint-restore/go-criu/v7/crit/images/core-x86"
	core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// fillPages gives every page of a pagemap a content that names it, and returns
// where in memory each page is.
func fillPages(t *testing.T, dir, name string) map[uint64][]byte {
	t.Helper()
	d, err := openImages(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	pages := map[uint64][]byte{}
	var all []byte
	id, err := d.pagemap(name, func(r run) error {
		if r.flags&pagePresent == 0 {
			return nil
		}
		for a := r.addr; a < r.addr+r.pages*PageSize; a += PageSize {
			p := bytes.Repeat(fmt.Appendf(nil, "%s %15x.", name[:8], a), PageSize/25+1)[:PageSize]
			pages[a] = p
			all = append(all, p...)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, fmt.Sprintf("pages-%d.img", id)), all)
	return pages
}

type note struct {
	owner string
	typ   uint32
	desc  []byte
}

func makeCore(t *testing.T, dir string, pid uint32) *elf.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "core"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := WriteCore(context.Background(), dir, pid, f); err != nil {
		t.Fatal(err)
	}
	e, err := elf.NewFile(f)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func notes(t *testing.T, e *elf.File) []note {
	t.Helper()
	b, err := io.ReadAll(e.Progs[0].Open())
	if err != nil || e.Progs[0].Type != elf.PT_NOTE {
		t.Fatalf("first segment %v, error %v", e.Progs[0].Type, err)
	}
	var ns []note
	for le := binary.LittleEndian; len(b) > 0; {
		name, desc := int(le.Uint32(b)), int(le.Uint32(b[4:]))
		n := note{typ: le.Uint32(b[8:]), owner: string(b[12 : 12+name-1])}
		b = b[12+(name+3)/4*4:]
		n.desc, b = b[:desc], b[(desc+3)/4*4:]
		ns = append(ns, n)
	}
	return ns
}

// pageAt is a page of memory in the core file; ok is false where it has none.
func pageAt(t *testing.T, e *elf.File, addr uint64) (page []byte, ok bool) {
	t.Helper()
	for _, p := range e.Progs[1:] {
		if p.Vaddr <= addr && addr < p.Vaddr+p.Memsz {
			if addr >= p.Vaddr+p.Filesz {
				return nil, false
			}
			page = make([]byte, PageSize)
			if _, err := p.ReadAt(page, int64(addr-p.Vaddr)); err != nil {
				t.Fatal(err)
			}
			return page, true
		}
	}
	t.Fatalf("%#x is in no segment", addr)
	return nil, false
}

func TestWriteCore(t *testing.T) {
	dir := copyImages(t)
	private := fillPages(t, dir, "pagemap-1.img")
	shared := fillPages(t, dir, "pagemap-shmem-1029.img")
	if len(private) != 33 || len(shared) != 1 {
		t.Fatalf("%d private and %d shared pages in the sample", len(private), len(shared))
	}
	e := makeCore(t, dir, 1)
	if e.Type != elf.ET_CORE || e.Machine != elf.EM_X86_64 || e.Class != elf.ELFCLASS64 {
		t.Errorf("header %+v", e.FileHeader)
	}

	ns := notes(t, e)
	var types []uint32
	for _, n := range ns {
		types = append(types, n.typ)
	}
	if fmt.Sprint(types) != fmt.Sprint([]uint32{1, 3, 6, 0x46494c45, 2, 1, 2}) {
		t.Fatalf("notes %v", types)
	}
	le := binary.LittleEndian
	d, err := openImages(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for i, tid := range map[int]uint32{0: 1, 5: 6} {
		c, err := d.core(tid)
		if err != nil {
			t.Fatal(err)
		}
		s, g := ns[i].desc, c.GetThreadInfo().GetGpregs()
		if len(s) != 336 || le.Uint32(s[32:]) != tid || le.Uint16(s[12:]) != 0 || le.Uint32(s[328:]) != 1 {
			t.Errorf("status of %d bytes of thread %d, signal %d", len(s), le.Uint32(s[32:]), le.Uint16(s[12:]))
		}
		for off, want := range map[int]uint64{0: g.GetR15(), 10: g.GetAx(), 15: g.GetOrigAx(), 16: g.GetIp(), 19: g.GetSp(), 21: g.GetFsBase(), 26: g.GetGs()} {
			if got := le.Uint64(s[112+8*off:]); got != want {
				t.Errorf("thread %d: register %d is %#x, want %#x", tid, off, got, want)
			}
		}
		if g.GetIp() == 0 || g.GetSp() == 0 {
			t.Errorf("thread %d has no registers in the sample", tid)
		}
		f := ns[i+1].desc
		if i == 0 {
			f = ns[4].desc
		}
		if len(f) != 512 || le.Uint32(f[24:]) != c.GetThreadInfo().GetFpregs().GetMxcsr() {
			t.Errorf("thread %d: floating-point registers of %d bytes, mxcsr %#x", tid, len(f), le.Uint32(f[24:]))
		}
	}
	info := ns[1].desc
	if len(info) != 136 || le.Uint32(info[24:]) != 1 || string(info[40:44]) != "app\x00" || info[1] != 'R' {
		t.Errorf("information % x", info)
	}
	var m mm.MmEntry
	if err := d.one(&m, "mm-1.img", magicCommon, magicMM); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(ns[2].desc, words(m.GetMmSavedAuxv()...)) || len(ns[2].desc) < 16*10 {
		t.Errorf("auxiliary vector % x", ns[2].desc)
	}
	file := ns[3].desc
	if n := le.Uint64(file); n == 0 || le.Uint64(file[8:]) != PageSize || !bytes.Contains(file[16+24*n:], []byte("/app\x00")) || !bytes.HasSuffix(file, []byte("/tmp/locked\x00")) {
		t.Errorf("mapped files %q", file)
	}

	// Segments follow the mappings, without holes in between or overlaps.
	at := 1
	var memfd uint64
	for _, v := range m.GetVmas() {
		if v.GetStatus()&vmaVsyscall != 0 {
			continue
		}
		if isSharedMemfd(v) {
			memfd = v.GetStart()
		}
		for a := v.GetStart(); a < v.GetEnd(); at++ {
			if at >= len(e.Progs) || e.Progs[at].Vaddr != a || e.Progs[at].Type != elf.PT_LOAD || e.Progs[at].Off%PageSize != 0 {
				t.Fatalf("segment %d of %d is %+v, want one at %#x", at, len(e.Progs), e.Progs[min(at, len(e.Progs)-1)].ProgHeader, a)
			}
			p := e.Progs[at]
			if r, w, x := p.Flags&elf.PF_R != 0, p.Flags&elf.PF_W != 0, p.Flags&elf.PF_X != 0; r != (v.GetProt()&1 != 0) || w != (v.GetProt()&2 != 0) || x != (v.GetProt()&4 != 0) {
				t.Errorf("mapping %#x: flags %v, protection %#x", a, p.Flags, v.GetProt())
			}
			a += p.Memsz
		}
	}
	if at != len(e.Progs) {
		t.Errorf("%d segments, want %d", len(e.Progs), at)
	}
	for addr, want := range private {
		if got, ok := pageAt(t, e, addr); !ok || !bytes.Equal(got, want) {
			t.Errorf("page %#x: %.30q, %v, want %.30q", addr, got, ok, want)
		}
	}
	if got, ok := pageAt(t, e, memfd); !ok || !bytes.Equal(got, shared[0]) {
		t.Errorf("shared page at %#x: %.30q, %v", memfd, got, ok)
	}
	// The child.
	fillPages(t, dir, "pagemap-7.img")
	if ns := notes(t, makeCore(t, dir, 7)); le.Uint32(ns[0].desc[32:]) != 7 || le.Uint32(ns[0].desc[36:]) != 1 {
		t.Errorf("child: % x", ns[0].desc[32:40])
	}
}

// pagesAt is a run of pages as CRIU 4.2 writes it.
func pagesAt(addr, n uint64, flags uint32) *pagemap.PagemapEntry {
	e := &pagemap.PagemapEntry{Vaddr: proto.Uint64(addr), NrPages: proto.Uint32(0), Flags: proto.Uint32(flags)}
	e.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 5, protowire.VarintType), n))
	return e
}

func mapping(start, end uint64, status, flags uint32, shmid, offset uint64) *vma.VmaEntry {
	return &vma.VmaEntry{Start: &start, End: &end, Status: &status, Flags: &flags, Shmid: &shmid, Pgoff: &offset, Prot: proto.Uint32(3), Fd: proto.Int64(-1)}
}

// layout replaces the memory of process 1.
func layout(t *testing.T, dir string, vmas []*vma.VmaEntry, runs ...proto.Message) {
	t.Helper()
	edit(t, dir, "mm-1.img", magicMM, new(mm.MmEntry), func(m *mm.MmEntry) { m.Vmas = vmas })
	write(t, filepath.Join(dir, "pagemap-1.img"), encode(t, magicPagemap, append([]proto.Message{&pagemap.PagemapHead{PagesId: proto.Uint32(9)}}, runs...)...))
}

// TestCoreSegments checks how absent pages appear: of a file as segments
// without content, of anonymous memory as zeroes, and terabytes of them at no
// cost.
func TestCoreSegments(t *testing.T) {
	const private, shared, base = 2, 1, 1 << 40
	for name, tc := range map[string]struct {
		vmas []*vma.VmaEntry
		runs []proto.Message
		want string // address in pages/size in pages/size of content in pages
	}{
		"anonymous, empty": {[]*vma.VmaEntry{mapping(base, base+1<<44, vmaAnonPrivate, private, 0, 0)}, nil, "0/4294967296/0 "},
		"anonymous, small gaps": {[]*vma.VmaEntry{mapping(base, base+10*PageSize, vmaAnonPrivate, private, 0, 0)},
			[]proto.Message{pagesAt(base+PageSize, 2, 4), pagesAt(base+5*PageSize, 1, 4|2)}, "0/10/6 "},
		"anonymous, great gaps": {[]*vma.VmaEntry{mapping(base, base+1000*PageSize, vmaAnonPrivate, private, 0, 0)},
			[]proto.Message{pagesAt(base+300*PageSize, 1, 4), pagesAt(base+400*PageSize, 1, 4)}, "0/300/0 300/101/101 401/599/0 "},
		"file": {[]*vma.VmaEntry{mapping(base, base+10*PageSize, vmaFilePrivate, private, 3, 0)},
			[]proto.Message{pagesAt(base+PageSize, 2, 4), pagesAt(base+5*PageSize, 5, 4)}, "0/1/0 1/2/2 3/2/0 5/5/5 "},
		"run over two mappings": {[]*vma.VmaEntry{mapping(base, base+2*PageSize, vmaAnonPrivate, private, 0, 0), mapping(base+2*PageSize, base+4*PageSize, vmaFilePrivate, private, 3, 0)},
			[]proto.Message{pagesAt(base+PageSize, 2, 4)}, "0/2/2 2/1/1 3/1/0 "},
		"no content of its own": {[]*vma.VmaEntry{mapping(base, base+2*PageSize, vmaFileShared, shared, 3, 0), mapping(base+2*PageSize, base+4*PageSize, vmaAnonShared|vmaSysV, shared, 1029, 0), mapping(base+5*PageSize, base+6*PageSize, vmaVvar, private, 0, 0)},
			nil, "0/2/0 2/2/0 5/1/0 "},
		"shared, with an offset": {[]*vma.VmaEntry{mapping(base, base+2*PageSize, vmaAnonShared, shared, 1029, 0), mapping(base+2*PageSize, base+4*PageSize, vmaAnonShared, shared, 1029, PageSize)},
			nil, "0/2/1 2/2/0 "},
		"guard and vsyscall": {[]*vma.VmaEntry{mapping(base, base+2*PageSize, vmaAnonPrivate, private, 0, 0), mapping(1<<64-10<<20, 1<<64-10<<20+PageSize, vmaVsyscall, private, 0, 0), mapping(base, base+PageSize, vmaGuard, private, 0, 0)},
			nil, "0/2/0 "},
	} {
		t.Run(name, func(t *testing.T) {
			dir := copyImages(t)
			layout(t, dir, tc.vmas, tc.runs...)
			pages := fillPages(t, dir, "pagemap-1.img")
			fillPages(t, dir, "pagemap-shmem-1029.img")
			e := makeCore(t, dir, 1)
			got := ""
			for _, p := range e.Progs[1:] {
				got += fmt.Sprintf("%d/%d/%d ", (p.Vaddr-base)/PageSize, p.Memsz/PageSize, p.Filesz/PageSize)
			}
			if got != tc.want {
				t.Errorf("segments %s, want %s", got, tc.want)
			}
			for addr, want := range pages {
				if got, ok := pageAt(t, e, addr); !ok || !bytes.Equal(got, want) {
					t.Errorf("page %#x: %.30q, %v, want %.30q", addr, got, ok, want)
				}
			}
		})
	}
}

// TestCoreOfManySegments has more of them than fit into the header's field.
func TestCoreOfManySegments(t *testing.T) {
	dir := copyImages(t)
	const base, n = 1 << 40, 70000
	var vmas []*vma.VmaEntry
	for i := range uint64(n) {
		vmas = append(vmas, mapping(base+i*PageSize, base+(i+1)*PageSize, vmaAnonPrivate, 2, 0, 0))
	}
	layout(t, dir, vmas)
	f, err := os.Create(filepath.Join(t.TempDir(), "core"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := WriteCore(context.Background(), dir, 1, f); err != nil {
		t.Fatal(err)
	}
	var h elf.Header64
	var s elf.Section64
	if err := binary.Read(io.NewSectionReader(f, 0, headerSize), binary.LittleEndian, &h); err != nil {
		t.Fatal(err)
	}
	if err := binary.Read(io.NewSectionReader(f, int64(h.Shoff), sectionSize), binary.LittleEndian, &s); err != nil {
		t.Fatal(err)
	}
	if h.Phnum != 0xffff || h.Shnum != 1 || s.Info != n+1 {
		t.Errorf("number of segments %#x, of sections %d, in the section %d; want %d", h.Phnum, h.Shnum, s.Info, n+1)
	}
	var p elf.Prog64
	if err := binary.Read(io.NewSectionReader(f, headerSize+programSize*n, programSize), binary.LittleEndian, &p); err != nil {
		t.Fatal(err)
	}
	if p.Vaddr != base+(n-1)*PageSize || p.Filesz != 0 || p.Memsz != PageSize {
		t.Errorf("last segment %+v", p)
	}
}

func TestCoreOfARM(t *testing.T) {
	dir := copyImages(t)
	fillPages(t, dir, "pagemap-1.img")
	fillPages(t, dir, "pagemap-shmem-1029.img")
	for _, name := range []string{"core-1.img", "core-6.img"} {
		edit(t, dir, name, magicCore, new(core.CoreEntry), func(e *core.CoreEntry) {
			regs, vregs := make([]uint64, 31), make([]uint64, 64)
			regs[30], vregs[63] = 30, 63
			e.Mtype, e.ThreadInfo = core.CoreEntry_AARCH64.Enum(), nil
			e.TiAarch64 = &aarch64.ThreadInfoAarch64{Tls: proto.Uint64(7),
				Gpregs: &aarch64.UserAarch64RegsEntry{Regs: regs, Sp: proto.Uint64(31), Pc: proto.Uint64(32), Pstate: proto.Uint64(33)},
				Fpsimd: &aarch64.UserAarch64FpsimdContextEntry{Vregs: vregs, Fpsr: proto.Uint32(64), Fpcr: proto.Uint32(65)}}
		})
	}
	e := makeCore(t, dir, 1)
	ns, le := notes(t, e), binary.LittleEndian
	if e.Machine != elf.EM_AARCH64 || len(ns) != 9 {
		t.Fatalf("machine %v, %d notes", e.Machine, len(ns))
	}
	status, float, tls := ns[0].desc, ns[4].desc, ns[5]
	if len(status) != 392 || le.Uint64(status[112+8*30:]) != 30 || le.Uint64(status[112+8*31:]) != 31 || le.Uint64(status[112+8*32:]) != 32 || le.Uint64(status[112+8*33:]) != 33 {
		t.Errorf("status % x", status)
	}
	if len(float) != 528 || le.Uint64(float[8*63:]) != 63 || le.Uint32(float[512:]) != 64 {
		t.Errorf("floating-point registers % x", float)
	}
	if tls.owner != "LINUX" || tls.typ != 0x401 || !bytes.Equal(tls.desc, words(7)) {
		t.Errorf("thread pointer %+v", tls)
	}
}

// TestCoreOfHostileImages: an error of the right class, no crash.
func TestCoreOfHostileImages(t *testing.T) {
	const base = 1 << 40
	onCore := func(f func(*core.CoreEntry)) func(*testing.T, string) {
		return func(t *testing.T, dir string) { edit(t, dir, "core-6.img", magicCore, new(core.CoreEntry), f) }
	}
	onMM := func(f func(*mm.MmEntry)) func(*testing.T, string) {
		return func(t *testing.T, dir string) { edit(t, dir, "mm-1.img", magicMM, new(mm.MmEntry), f) }
	}
	anon := mapping(base, base+PageSize, vmaAnonPrivate, 2, 0, 0)
	for name, tc := range map[string]struct {
		pid    uint32
		damage func(t *testing.T, dir string)
		want   error
	}{
		"no such process": {9, nil, errdefs.ErrNotFound},
		"thread":          {6, nil, errdefs.ErrNotFound},
		"zombie":          {8, nil, errdefs.ErrFailedPrecondition},
		"other machine":   {1, onCore(func(e *core.CoreEntry) { e.Mtype = core.CoreEntry_S390.Enum() }), errdefs.ErrNotImplemented},
		"unknown machine": {1, onCore(func(e *core.CoreEntry) { e.Mtype = core.CoreEntryMarch(99).Enum() }), errdefs.ErrNotImplemented},
		"32 bits":         {1, onCore(func(e *core.CoreEntry) { e.ThreadInfo.Gpregs.Mode = corex86.UserX86RegsMode_COMPAT.Enum() }), errdefs.ErrNotImplemented},
		"no registers":    {1, onCore(func(e *core.CoreEntry) { e.ThreadInfo = nil }), checkpoint.ErrCorrupt},
		"machines differ": {1, onCore(func(e *core.CoreEntry) {
			e.Mtype = core.CoreEntry_AARCH64.Enum()
			e.TiAarch64 = &aarch64.ThreadInfoAarch64{Gpregs: &aarch64.UserAarch64RegsEntry{Regs: make([]uint64, 31)}}
		}), checkpoint.ErrCorrupt},
		"few registers":   {1, onCore(func(e *core.CoreEntry) { e.Mtype = core.CoreEntry_AARCH64.Enum() }), checkpoint.ErrCorrupt},
		"few xmm":         {1, onCore(func(e *core.CoreEntry) { e.ThreadInfo.Fpregs.XmmSpace = e.ThreadInfo.Fpregs.XmmSpace[1:] }), checkpoint.ErrCorrupt},
		"no thread":       {1, func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "core-6.img")) }, os.ErrNotExist},
		"no pages":        {1, func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "pages-1.img")) }, checkpoint.ErrCorrupt},
		"pages cut short": {1, func(t *testing.T, dir string) { os.Truncate(filepath.Join(dir, "pages-2.img"), 33*PageSize-1) }, checkpoint.ErrCorrupt},
		"pages are a link": {1, func(t *testing.T, dir string) {
			p := filepath.Join(dir, "pages-1.img")
			os.Rename(p, p+"x")
			os.Symlink(p+"x", p)
		}, checkpoint.ErrCorrupt},
		"long vector":          {1, onMM(func(m *mm.MmEntry) { m.MmSavedAuxv = make([]uint64, maxAuxv+1) }), checkpoint.ErrCorrupt},
		"arguments anywhere":   {1, onMM(func(m *mm.MmEntry) { m.MmArgStart, m.MmArgEnd = proto.Uint64(1<<64-1), proto.Uint64(1) }), nil},
		"arguments at the end": {1, onMM(func(m *mm.MmEntry) { m.MmArgStart, m.MmArgEnd = proto.Uint64(1<<64-9), proto.Uint64(1<<64-1) }), nil},
		"unsorted":             {1, onMM(func(m *mm.MmEntry) { m.Vmas[0], m.Vmas[1] = m.Vmas[1], m.Vmas[0] }), checkpoint.ErrCorrupt},
		"unaligned":            {1, onMM(func(m *mm.MmEntry) { *m.Vmas[0].Start++ }), checkpoint.ErrCorrupt},
		"backwards":            {1, onMM(func(m *mm.MmEntry) { m.Vmas[0].Start = m.Vmas[0].End }), checkpoint.ErrCorrupt},
		"above user space": {1, onMM(func(m *mm.MmEntry) {
			m.Vmas[0].Start, m.Vmas[0].End = proto.Uint64(1<<63), proto.Uint64(1<<64-PageSize)
		}), checkpoint.ErrCorrupt},
		"offset of shared memory": {1, func(t *testing.T, dir string) {
			layout(t, dir, []*vma.VmaEntry{mapping(base, base+PageSize, vmaAnonShared, 1, 1029, 1<<64-PageSize)})
		}, checkpoint.ErrCorrupt},
		"memfd of nothing": {1, func(t *testing.T, dir string) {
			layout(t, dir, []*vma.VmaEntry{mapping(base, base+PageSize, vmaMemfd|vmaFileShared, 1, 77, 0)})
		}, checkpoint.ErrCorrupt},
		"in the parent": {1, func(t *testing.T, dir string) { layout(t, dir, []*vma.VmaEntry{anon}, pagesAt(base, 1, pageParent)) }, errdefs.ErrNotImplemented},
		"never written": {1, func(t *testing.T, dir string) { layout(t, dir, []*vma.VmaEntry{anon}, pagesAt(base, 1, pageLazy)) }, errdefs.ErrNotImplemented},
		"runs overlap": {1, func(t *testing.T, dir string) {
			layout(t, dir, []*vma.VmaEntry{anon}, pagesAt(base, 2, 4), pagesAt(base+PageSize, 2, 4))
		}, checkpoint.ErrCorrupt},
		"more than the file": {1, func(t *testing.T, dir string) {
			layout(t, dir, []*vma.VmaEntry{anon}, pagesAt(0, maxAddress/PageSize, 4))
		}, checkpoint.ErrCorrupt},
		"shared memory without end": {1, func(t *testing.T, dir string) {
			var vmas []*vma.VmaEntry
			for i := range uint64(10000) {
				vmas = append(vmas, mapping(base+i*PageSize, base+(i+1)*PageSize, vmaAnonShared, 1, 1029, 0))
			}
			layout(t, dir, vmas)
		}, checkpoint.ErrCorrupt},
		"name with a zero": {1, func(t *testing.T, dir string) {
			edit(t, dir, "files.img", magicFiles, new(fdinfo.FileEntry), func(e *fdinfo.FileEntry) {
				if e.Reg != nil {
					e.Reg.Name = proto.String("a\x00b")
				}
			})
		}, checkpoint.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			dir := copyImages(t)
			fillPages(t, dir, "pagemap-1.img")
			fillPages(t, dir, "pagemap-shmem-1029.img")
			if tc.damage != nil {
				tc.damage(t, dir)
			}
			f, err := os.Create(filepath.Join(t.TempDir(), "core"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := WriteCore(context.Background(), dir, tc.pid, f); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			} else {
				t.Log(err)
			}
		})
	}
	dir := copyImages(t)
	fillPages(t, dir, "pagemap-1.img")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := WriteCore(ctx, dir, 1, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}
