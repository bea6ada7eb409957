package criu

import (
	"os"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// ksmDir is there if the kernel was built with CONFIG_KSM.
const ksmDir = "/sys/kernel/mm/ksm"

// CanMerge tells whether the kernel can merge pages (KSM), whether or not it does
// so at present.
func CanMerge() bool {
	_, err := os.Stat(ksmDir)
	return err == nil
}

// SetMergeable has a restore offer the private memory of its processes to the
// kernel for merging (MADV_MERGEABLE), or no memory at all, whatever was offered
// when it was dumped. dir is the view of imageDir that [LinkImages] made; the
// images of processes for which that changes anything are replaced by copies.
//
// CRIU calls madvise for each bit of a mapping's madv when the mapping is in its
// place (criu/pie/restorer.c:__export_restore_task), and fails if that fails,
// which it does for this one if the kernel was built without KSM: see [CanMerge].
// At a dump CRIU finds the bit in the VmFlags of /proc/PID/smaps
// (criu/proc_parse.c:__parse_vmflags), so it stays with the memory from then on.
func SetMergeable(imageDir, dir string, on bool) error {
	d, err := openImages(imageDir)
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.names("mm-*.img")
	if err != nil {
		return err
	}
	view, err := openImages(dir)
	if err != nil {
		return err
	}
	defer view.Close()
	for _, name := range names {
		var e mm.MmEntry
		if err := d.one(&e, name, magicCommon, magicMM); err != nil {
			return err
		}
		if len(e.GetVmas()) > maxMappings {
			return d.corrupt(name, "%d mappings", len(e.GetVmas()))
		}
		changed := false
		for _, v := range e.GetVmas() {
			changed = offer(v, on) || changed
		}
		if !changed {
			continue
		}
		if err := view.replace(name, magicMM, &e); err != nil {
			return err
		}
	}
	return nil
}

// offer has a mapping be offered, or not, and tells whether that is a change.
func offer(v *vma.VmaEntry, on bool) (changed bool) {
	madv := v.GetMadv() &^ (1 << unix.MADV_MERGEABLE)
	if on && worthMerging(v) {
		madv |= 1 << unix.MADV_MERGEABLE
	}
	if madv == v.GetMadv() {
		return false
	}
	v.Madv = proto.Uint64(madv)
	return true
}

// worthMerging tells whether a mapping is offered: anonymous memory of the
// process alone. Left out is
//
//   - what the program has locked, or keeps out of core dumps: there are its
//     secrets, of which others are not to learn by how long a write takes;
//   - the stack, which differs from the first call on; those of other threads
//     look like any memory;
//   - what cannot be accessed: it is reserved, mostly, and much of it, and older
//     kernels look at each address in it.
func worthMerging(v *vma.VmaEntry) bool {
	return canBeLazy(v) && v.GetStatus()&(vmaStack|vmaGuard|vmaAIO) == 0 &&
		v.GetFlags()&(unix.MAP_GROWSDOWN|mapDroppable) == 0 &&
		v.GetMadv()&(1<<unix.MADV_DONTDUMP) == 0 && v.GetProt() != unix.PROT_NONE
}
