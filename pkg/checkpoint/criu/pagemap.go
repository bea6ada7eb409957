package criu

import (
	"errors"
	"fmt"
	"os"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// LazyMemory is what CRIU leaves out of a restore with [ConfigOptions.LazyPages]
// and a pager must bring: private anonymous memory, but for the stacks' pages in
// use (CRIU criu/mem.c:restore_priv_vma_content). All other memory CRIU reads
// itself.
type LazyMemory struct {
	Tasks []LazyTask // one for each process of pstree.img
}

// LazyTask is the lazy memory of one process.
type LazyTask struct {
	PID    uint32 // in the container's namespace
	Zombie bool   // it has no memory
	// Runs are sorted by address; none crosses the border of a mapping, as one
	// userfaultfd operation cannot.
	Runs []LazyRun
	// Pages holds the content; nil where there are no runs.
	Pages     *os.File
	PagesSize int64 // bytes; each run lies within
}

// LazyRun is memory whose content lies in one piece in the file of pages.
// Address, size and offset are multiples of [PageSize].
type LazyRun struct {
	Addr, Size uint64
	Off        int64
	// NotInherited: a child of fork does not get this content, as madvise(2) was
	// told (MADV_DONTFORK, MADV_WIPEONFORK).
	NotInherited bool
}

// Bytes is the size of all runs.
func (m *LazyMemory) Bytes() (n uint64) {
	for _, t := range m.Tasks {
		for _, r := range t.Runs {
			n += r.Size
		}
	}
	return n
}

// Close closes the files of pages.
func (m *LazyMemory) Close() error {
	var errs []error
	for _, t := range m.Tasks {
		if t.Pages != nil {
			errs = append(errs, t.Pages.Close())
		}
	}
	return errors.Join(errs...)
}

// OpenLazyMemory reads what the images say about lazy memory and opens the
// files with its content. The directory must hold the images themselves, not
// links to them as [LinkImages] makes.
//
// Images that cannot be restored lazily, though otherwise whole, are refused
// with [errdefs.ErrNotImplemented]: those of incremental or lazy dumps, and
// those with memory that CRIU takes for lazy and the kernel refuses to register
// with a userfaultfd. What does not parse or does not fit together is
// [checkpoint.ErrCorrupt].
func OpenLazyMemory(imageDir string) (_ *LazyMemory, err error) {
	d, err := openImages(imageDir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	tasks, err := d.tasks()
	if err != nil {
		return nil, err
	}
	m := new(LazyMemory)
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	left := maxPieces
	for _, t := range tasks {
		l := LazyTask{PID: t.pid, Zombie: t.zombie()}
		if !l.Zombie {
			if err := d.lazyTask(&l, left); err != nil {
				return nil, err
			}
			left -= len(l.Runs)
		}
		m.Tasks = append(m.Tasks, l)
	}
	return m, nil
}

// lazyTask reads a process's runs, at most limit of them, and opens its pages.
func (d *images) lazyTask(t *LazyTask, limit int) error {
	var e mm.MmEntry
	name := mmName(t.PID)
	if err := d.one(&e, name, magicCommon, magicMM); err != nil {
		return err
	}
	vmas, err := d.lazyVMAs(name, e.GetVmas())
	if err != nil {
		return err
	}
	name = pagemapName(t.PID)
	id, size, err := d.presentRuns(name, func(r run, off uint64) error {
		if r.flags&pageLazy == 0 {
			return nil
		}
		for addr, end := r.addr, r.addr+r.pages*PageSize; addr < end; {
			for len(vmas) > 0 && vmas[0].GetEnd() <= addr {
				vmas = vmas[1:]
			}
			if len(vmas) == 0 || vmas[0].GetStart() > addr || !canBeLazy(vmas[0]) {
				return d.corrupt(name, "lazy pages at %#x, where no memory can be lazy", addr)
			}
			part := LazyRun{
				Addr: addr, Size: min(end, vmas[0].GetEnd()) - addr, Off: int64(off + addr - r.addr),
				NotInherited: vmas[0].GetMadv()&(1<<unix.MADV_DONTFORK|1<<unix.MADV_WIPEONFORK) != 0,
			}
			if len(t.Runs) >= limit {
				return d.corrupt(name, "more than %d runs of pages", maxPieces)
			}
			t.Runs = append(t.Runs, part)
			addr += part.Size
		}
		return nil
	})
	if absent(err) {
		return nil // no memory of its own
	}
	if err != nil || len(t.Runs) == 0 {
		return err
	}
	t.Pages, t.PagesSize, err = d.openPages(id, name, size)
	return err
}

// presentRuns calls f with each run of a pagemap whose content is in the file of pages,
// and with where it is in there, and returns the file's id and the size of all of it,
// in bytes. Pages that are in other images are refused with [errdefs.ErrNotImplemented].
func (d *images) presentRuns(name string, f func(r run, off uint64) error) (pagesID uint32, size uint64, err error) {
	pagesID, err = d.pagemap(name, func(r run) error {
		if r.flags&pageParent != 0 || r.flags&(pageLazy|pagePresent) == pageLazy {
			return fmt.Errorf("image %s: pages at %#x are in other images, of an incremental or lazy dump: %w", name, r.addr, errdefs.ErrNotImplemented)
		}
		if r.flags&pagePresent == 0 {
			return nil
		}
		off, n := size, r.pages*PageSize
		if size > maxAddress-n {
			return d.corrupt(name, "more than %#x bytes", uint64(maxAddress))
		}
		size += n
		return f(r, off)
	})
	return pagesID, size, err
}

// openPages opens the file of pages of a pagemap that has so many bytes in it, and
// returns its own size.
func (d *images) openPages(id uint32, pagemap string, size uint64) (*os.File, int64, error) {
	name := pagesName(id)
	f, have, err := openRegular(d.fd, name, -1)
	if absent(err) {
		return nil, 0, d.corrupt(name, "absent; %s has %d bytes in it", pagemap, size)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("image: %w", err)
	}
	if uint64(have) < size {
		f.Close()
		return nil, 0, d.corrupt(name, "%d bytes, %s has %d in it", have, pagemap, size)
	}
	return f, have, nil
}

func pagesName(id uint32) string    { return fmt.Sprintf("pages-%d.img", id) }
func pagemapName(pid uint32) string { return fmt.Sprintf("pagemap-%d.img", pid) }
func mmName(pid uint32) string      { return fmt.Sprintf("mm-%d.img", pid) }

// lazyVMAs checks the mappings and leaves out what is none of its own.
func (d *images) lazyVMAs(name string, vmas []*vma.VmaEntry) ([]*vma.VmaEntry, error) {
	if len(vmas) > maxMappings {
		return nil, d.corrupt(name, "%d mappings", len(vmas))
	}
	var out []*vma.VmaEntry
	end := uint64(0)
	for _, v := range vmas {
		if v.GetStatus()&(vmaGuard|vmaVsyscall) != 0 {
			continue // within another mapping; above user space
		}
		if v.GetStart() >= v.GetEnd() || v.GetStart() < end || v.GetEnd() > maxAddress || (v.GetStart()|v.GetEnd())%PageSize != 0 {
			return nil, d.corrupt(name, "mapping %#x-%#x", v.GetStart(), v.GetEnd())
		}
		if canBeLazy(v) && v.GetFlags()&mapDroppable != 0 {
			return nil, fmt.Errorf("image %s: memory at %#x that the kernel may drop cannot be filled by a pager: %w", name, v.GetStart(), errdefs.ErrNotImplemented)
		}
		end = v.GetEnd()
		out = append(out, v)
	}
	return out, nil
}

// mapDroppable is MAP_DROPPABLE, include/uapi/linux/mman.h, which the kernel
// does not register with a userfaultfd (include/linux/userfaultfd_k.h:
// vma_can_userfault), while CRIU tries to.
const mapDroppable = 0x08

// canBeLazy is CRIU criu/include/vma.h:vma_entry_can_be_lazy: CRIU registers
// such a mapping as a whole, and no other.
func canBeLazy(v *vma.VmaEntry) bool {
	const need = unix.MAP_ANONYMOUS | unix.MAP_PRIVATE
	return v.GetFlags()&(need|unix.MAP_LOCKED|unix.MAP_HUGETLB) == need &&
		v.GetStatus()&(vmaVdso|vmaVvar|vmaVsyscall) == 0
}
