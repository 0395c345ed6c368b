// The images that requests of this browser were made of, so that one can be made again: the server does not give them back.

const MOST = 40;
const STORE = "files";

function opened() {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open("triptych", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE);
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
}

async function within(mode, work) {
  const database = await opened();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(STORE, mode);
    const asked = work(transaction.objectStore(STORE));
    transaction.oncomplete = () => (database.close(), resolve(asked?.result));
    transaction.onabort = () => (database.close(), reject(transaction.error));
  });
}

/** Keep the files of a request, and forget those of the oldest. Ids sort by time. */
export async function keepFiles(id, entries) {
  try {
    const ids = await within("readonly", (store) => store.getAllKeys());
    await within("readwrite", (store) => {
      for (const old of ids.slice(0, Math.max(0, ids.length - MOST + 1))) store.delete(old);
      store.put(entries, id);
    });
  } catch (error) {
    console.warn("the images are not kept for later", error); // a private window, or a full disk: the request goes on
  }
}

/** Return names and files of a request, [] where they are not kept. */
export async function filesOf(id) {
  try {
    return (await within("readonly", (store) => store.get(id))) ?? [];
  } catch (error) {
    console.warn("kept images cannot be read", error); // as above
    return [];
  }
}

/** Forget the files of a request. */
export async function forgetFiles(id) {
  await within("readwrite", (store) => store.delete(id)).catch(() => {}); // there were none to keep
}
